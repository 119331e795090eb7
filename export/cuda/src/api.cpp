// The C interface: no exception leaves it.
#include <algorithm>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "checked.h"
#include "cpm.h"
#include "model.h"

struct cpm_model {
  cpm_model(const char* folder, const cpm::Options& options) : model(folder, options) {}
  cpm::Model model;
};

namespace {

thread_local std::string last_error;

// Runs a function; an exception becomes the last error, and `otherwise` the result.
template <typename Result, typename Function>
Result guarded(Result otherwise, Function function) noexcept {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return otherwise;
}

void require(const void* pointer, const char* name) {
  if (pointer == nullptr) cpm::fail(std::string(name) + " = NULL");
}

}  // namespace

const char* cpm_last_error(void) { return last_error.c_str(); }

cpm_model* cpm_open(const char* folder, const cpm_options* options) {
  return guarded<cpm_model*>(nullptr, [&] {
    require(folder, "folder");
    cpm::Options chosen;
    if (options != nullptr) {
      chosen = {options->capacity, options->chunk, options->threads, options->backend ? options->backend : "cpu",
                options->mtp != 0};
    }
    return new cpm_model(folder, chosen);
  });
}

void cpm_close(cpm_model* model) { delete model; }

void cpm_memory_plan(const cpm_model* model, cpm_plan* plan) {
  const cpm::MemoryPlan& pool = model->model.plan();
  *plan = {model->model.mapped_bytes(),
           pool.bytes(cpm::MemoryPlan::kWeights),
           pool.bytes(cpm::MemoryPlan::kActivations),
           pool.bytes(cpm::MemoryPlan::kCache),
           pool.total(),
           model->model.capacity(),
           model->model.is_sparse() ? 1 : 0};
}

int32_t cpm_vocab_size(const cpm_model* model) { return model->model.config().vocab_size; }

int32_t cpm_is_eos(const cpm_model* model, int32_t token) { return model->model.ends_text(token) ? 1 : 0; }

int64_t cpm_length(const cpm_model* model) { return model->model.length(); }

int32_t cpm_truncate(cpm_model* model, int64_t length) {
  return guarded(-1, [&] {
    model->model.truncate(length);
    return 0;
  });
}

int32_t cpm_prefill(cpm_model* model, const int32_t* tokens, int64_t count, float* logits) {
  return guarded(-1, [&] {
    if (count > 0) require(tokens, "tokens");
    model->model.append(tokens, count, logits, false);
    return 0;
  });
}

int32_t cpm_score(cpm_model* model, const int32_t* tokens, int64_t count, float* logits) {
  return guarded(-1, [&] {
    if (count > 0) require(tokens, "tokens");
    require(logits, "logits");
    model->model.append(tokens, count, logits, true);
    return 0;
  });
}

int32_t cpm_decode(cpm_model* model, int32_t token, float* logits) { return cpm_prefill(model, &token, 1, logits); }

int32_t cpm_verify_tree(cpm_model* model, const int32_t* tokens, const int32_t* parents, int32_t count,
                        int32_t* accepted, float* logits) {
  return guarded(-1, [&] {
    require(tokens, "tokens");
    require(parents, "parents");
    require(accepted, "accepted");
    const std::vector<int32_t> indices = model->model.verify(tokens, parents, count, logits);
    std::copy(indices.begin(), indices.end(), accepted);
    return static_cast<int32_t>(indices.size());
  });
}

int32_t cpm_mtp_layers(const cpm_model* model) { return model->model.mtp_layers(); }

int32_t cpm_draft(cpm_model* model, int32_t token, int32_t* drafts) {
  return guarded(-1, [&] {
    require(drafts, "drafts");
    const std::vector<int32_t> tokens = model->model.draft(token);
    std::copy(tokens.begin(), tokens.end(), drafts);
    return static_cast<int32_t>(tokens.size());
  });
}
