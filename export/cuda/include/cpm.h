// Generates from an exported Hugging Face folder without Python. C interface; everything else is private.
//
// A model holds one sequence. Functions return 0, or -1 after an error, whose text cpm_last_error() then gives; no
// function ends the process because of what a file or a caller says. A model is used by one thread at a time.
#ifndef CPM_H_
#define CPM_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct cpm_model cpm_model;

// Zeros choose the defaults.
typedef struct {
  int64_t capacity;     // tokens that the KV cache holds; 0 is max_position_embeddings of config.json
  int32_t chunk;        // tokens of a prompt that are computed together; 0 is 128
  int32_t threads;      // of the CPU; 0 is one for each core
  const char* backend;  // NULL or "cpu"; "cuda" where the library was built with it, on the device that is current in
                        // the thread that opens the model: it has to be in every thread that uses it
  int32_t mtp;          // 1 loads MTP layers too, where the model has any: they draft tokens
} cpm_options;

// Where the bytes go. All but the mapped ones are one allocation, made when the model is opened, in this order.
typedef struct {
  uint64_t mapped_bytes;       // weights that are read where the files are mapped (CPU)
  uint64_t weights_bytes;      // weights in the pool: norms and biases, on a GPU all of them
  uint64_t activations_bytes;  // what a chunk of tokens needs
  uint64_t cache_bytes;        // keys, values, and the means of keys that sparse attention scores
  uint64_t pool_bytes;         // the sum of the last three
  int64_t capacity;            // tokens that the KV cache holds
  int32_t sparse;              // whether a cache of this capacity attends sparsely (InfLLM v2)
} cpm_plan;

// The text of this thread's last error; "" before the first one.
const char* cpm_last_error(void);

// Opens the folder that the verb `export` wrote; options may be NULL. Returns NULL after an error.
cpm_model* cpm_open(const char* folder, const cpm_options* options);
void cpm_close(cpm_model* model);

void cpm_memory_plan(const cpm_model* model, cpm_plan* plan);
int32_t cpm_vocab_size(const cpm_model* model);

// Whether a token ends a text, by generation_config.json or config.json.
int32_t cpm_is_eos(const cpm_model* model, int32_t token);

// Tokens in the cache.
int64_t cpm_length(const cpm_model* model);

// Forgets all tokens but the first `length`.
int32_t cpm_truncate(cpm_model* model, int64_t length);

// Appends `count` tokens, a chunk at a time. `logits` is NULL, or takes vocab_size floats: what follows the last one.
int32_t cpm_prefill(cpm_model* model, const int32_t* tokens, int64_t count, float* logits);

// The same with the logits after each of the tokens, count * vocab_size floats.
int32_t cpm_score(cpm_model* model, const int32_t* tokens, int64_t count, float* logits);

// Appends one token.
int32_t cpm_decode(cpm_model* model, int32_t token, float* logits);

// Verifies up to 64 drafted tokens in one pass, as a tree: tokens[0] is the root, the token that follows the cache,
// with parents[0] = -1; every other token continues an earlier one, parents[i] < i. From the root on, the child that is
// the most likely token after its parent is accepted. The accepted tokens stay in the cache, as if cpm_decode had
// appended one after the other; `accepted` takes their indices, and has room for `count`. `logits` is NULL or takes
// those after the last accepted one. Returns how many were accepted, the root included.
int32_t cpm_verify_tree(cpm_model* model, const int32_t* tokens, const int32_t* parents, int32_t count,
                        int32_t* accepted, float* logits);

// MTP layers that were loaded.
int32_t cpm_mtp_layers(const cpm_model* model);

// Drafts what follows `token`, which follows the cache: a chain of cpm_mtp_layers() tokens, one of each MTP layer, to
// be verified with `token` as their root. Returns how many: 0 where nothing has been read yet, or since cpm_truncate.
int32_t cpm_draft(cpm_model* model, int32_t token, int32_t* drafts);

#ifdef __cplusplus
}
#endif

#endif  // CPM_H_
