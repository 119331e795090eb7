#include "weights.h"

#include <cstring>

#include "checked.h"

namespace cpm {
namespace {

constexpr int32_t kCodesPerWord = 8;
constexpr int32_t kMarlinBand = 16, kMarlinChunk = 64, kMarlinGroup = 128;

Format format_of(DType dtype) {
  return dtype == DType::kF32 ? Format::kF32 : dtype == DType::kF16 ? Format::kF16 : Format::kBF16;
}

std::vector<float> to_floats(const Tensor& tensor, int32_t size) {
  Matrix row{format_of(tensor.dtype), 1, size, tensor.data, nullptr, nullptr, 0, 0, 0};
  std::vector<float> values(static_cast<size_t>(size));
  for (int32_t i = 0; i < size; ++i) {
    float& value = values[static_cast<size_t>(i)];
    if (row.format == Format::kF32) value = weight<Format::kF32>(row, 0, i);
    if (row.format == Format::kF16) value = weight<Format::kF16>(row, 0, i);
    if (row.format == Format::kBF16) value = weight<Format::kBF16>(row, 0, i);
  }
  return values;
}

}  // namespace

Weights::Weights(const TensorFiles& files, const Config& config, bool mtp, const Backend& backend, MemoryPlan& plan)
    : files_(files), config_(config), mapped_(backend.reads_mapped_files()) {
  if (static_cast<size_t>(config.num_layers) > files.size()) {  // said before anything of that size is made
    fail("config.json: num_hidden_layers = " + std::to_string(config.num_layers) + ": the weights have only " +
         std::to_string(files.size()) + " tensors");
  }
  plain("model.embed_tokens.weight", config.vocab_size, config.d_model, embedding, plan);
  for (int32_t i = 0; i < config.num_layers; ++i) {
    layers.emplace_back();
    layer("model.layers." + std::to_string(i) + ".", layers.back(), plan);
  }
  for (int32_t i = 0; mtp && i < config.num_nextn_predict_layers; ++i) {
    mtp_layers.emplace_back();
    mtp_layer("model.mtp_layers." + std::to_string(i) + ".", mtp_layers.back(), plan);
  }
  vector("model.norm.weight", config.d_model, &norm, plan);
  if (!config.tie_word_embeddings) plain("lm_head.weight", config.vocab_size, config.d_model, head, plan);
  check_nothing_is_left();
}

void Weights::load(Backend& backend) {
  if (config_.tie_word_embeddings) head = embedding;  // now that it has its address
  for (const auto& copy : copies_) copy(backend);
  copies_.clear();
}

const Tensor& Weights::find(const std::string& name, std::initializer_list<DType> dtypes,
                            const std::vector<int64_t>& shape) {
  used_.insert(name);
  return files_.get(name, dtypes, shape);
}

template <typename T>
void Weights::place(const Tensor& tensor, const std::string& name, const T** place, MemoryPlan& plan) {
  if (mapped_) {
    *place = reinterpret_cast<const T*>(tensor.data);
    mapped_bytes_ = checked_add(mapped_bytes_, tensor.bytes, name);
    return;
  }
  const auto set = [place](uint8_t* at) { *place = reinterpret_cast<const T*>(at); };
  plan.add_bytes(MemoryPlan::kWeights, set, tensor.bytes, 1, name);
  copies_.push_back(
      [place, &tensor](Backend& backend) { backend.upload(const_cast<T*>(*place), tensor.data, tensor.bytes); });
}

// Norms and biases are small: they become floats in the pool, whatever they are in the file.
void Weights::vector(const std::string& name, int32_t length, const float** place, MemoryPlan& plan) {
  const Tensor& tensor = find(name, {DType::kF32, DType::kF16, DType::kBF16}, {length});
  plan.add(MemoryPlan::kWeights, place, static_cast<uint64_t>(length), name);
  copies_.push_back([place, length, &tensor](Backend& backend) {
    const std::vector<float> values = to_floats(tensor, length);
    backend.upload(const_cast<float*>(*place), values.data(), values.size() * sizeof(float));
  });
}

void Weights::plain(const std::string& name, int32_t rows, int32_t columns, Matrix& matrix, MemoryPlan& plan) {
  const Tensor& tensor = find(name, {DType::kF32, DType::kF16, DType::kBF16}, {rows, columns});
  matrix = {format_of(tensor.dtype), rows, columns, nullptr, nullptr, nullptr, 0, 0, rows};
  place(tensor, name, &matrix.values, plan);
}

void Weights::gptq(const std::string& name, int32_t rows, int32_t columns, Matrix& matrix, MemoryPlan& plan) {
  const int32_t group = config_.quantization.group_size > 0 ? config_.quantization.group_size : columns;
  if (columns % group || columns % kCodesPerWord || rows % kCodesPerWord) {
    fail("config.json: quantization_config: group_size = " + std::to_string(group) + ": " + name + " has " +
         std::to_string(columns) + " inputs and " + std::to_string(rows) +
         " outputs; accepted are inputs that groups divide, and multiples of 8 of both");
  }
  const int32_t groups = columns / group;
  const Tensor& words = find(name + ".qweight", {DType::kI32}, {columns / kCodesPerWord, rows});
  const Tensor& zeros = find(name + ".qzeros", {DType::kI32}, {groups, rows / kCodesPerWord});
  const Tensor& scales = find(name + ".scales", {DType::kF16}, {groups, rows});
  if (files_.has(name + ".g_idx")) {
    const Tensor& index = find(name + ".g_idx", {DType::kI32}, {columns});
    for (int32_t i = 0; i < columns; ++i) {
      int32_t value;
      std::memcpy(&value, index.data + static_cast<size_t>(i) * sizeof value, sizeof value);
      if (value != i / group) {
        fail(name + ".g_idx: input " + std::to_string(i) + " is of group " + std::to_string(value) +
             ": accepted are groups in the order of the inputs (desc_act false)");
      }
    }
  }
  matrix = {Format::kGptq, rows, columns, nullptr, nullptr, nullptr, group, 0, rows};
  place(words, name, &matrix.values, plan);
  place(zeros, name, &matrix.zeros, plan);
  place(scales, name, &matrix.scales, plan);
}

// Several layers fused by their outputs; each is a part of the rows.
void Weights::marlin(const std::string& name, const std::vector<int32_t>& rows, int32_t columns,
                     const std::vector<Matrix*>& matrices, MemoryPlan& plan) {
  const int32_t group = config_.quantization.group_size;
  if (group != kMarlinGroup) {  // which CPM.cu loads and export writes
    fail("config.json: quantization_config: group_size = " + std::to_string(group) + ": accepted is " +
         std::to_string(kMarlinGroup) + " with Marlin weights, which " + name + " has");
  }
  int64_t all = 0;
  for (const int32_t part : rows) all += part;
  if (all > INT32_MAX || all % kMarlinChunk || columns % group) {
    fail(name + " has " + std::to_string(columns) + " inputs and " + std::to_string(all) +
         " outputs: Marlin takes multiples of group_size = " + std::to_string(group) + ", and of " +
         std::to_string(kMarlinChunk));
  }
  const auto stored_rows = static_cast<int32_t>(all);
  const Tensor& words = find(name + ".qweight", {DType::kI32}, {columns / kMarlinBand, 2 * int64_t{stored_rows}});
  const Tensor& scales = find(name + ".scales", {DType::kF16}, {columns / group, stored_rows});
  int32_t first = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    *matrices[i] = {Format::kMarlin, rows[i], columns, nullptr, nullptr, nullptr, group, first, stored_rows};
    first += rows[i];
  }
  place(words, name, &matrices[0]->values, plan);
  place(scales, name, &matrices[0]->scales, plan);
  copies_.push_back([matrices](Backend&) {
    for (Matrix* matrix : matrices) {
      matrix->values = matrices[0]->values;
      matrix->scales = matrices[0]->scales;
    }
  });
}

void Weights::linear(const std::string& name, int32_t rows, int32_t columns, Matrix& matrix, MemoryPlan& plan) {
  if (config_.quantization.group_size == 0) {
    plain(name + ".weight", rows, columns, matrix, plan);
  } else {
    gptq(name, rows, columns, matrix, plan);
  }
}

void Weights::layer(const std::string& prefix, Layer& layer, MemoryPlan& plan) {
  const Config& c = config_;
  // The sizes of q, k and v: products of claims of a file, so they are checked.
  const auto heads = [&c](int32_t number, const char* field) {
    const int64_t values = static_cast<int64_t>(number) * c.head_dim;
    if (values > INT32_MAX) fail(std::string("config.json: ") + field + " times head_dim is beyond 31 bits");
    return static_cast<int32_t>(values);
  };
  const int32_t q_size = heads(c.num_heads, "num_attention_heads"),
                kv_size = heads(c.num_kv_heads, "num_key_value_heads");
  const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
  vector(prefix + "input_layernorm.weight", c.d_model, &layer.input_norm, plan);
  if (c.quantization.group_size != 0 && files_.has(attention + "qkv_proj.qweight")) {
    marlin(attention + "qkv_proj", {q_size, kv_size, kv_size}, c.d_model, {&layer.q, &layer.k, &layer.v}, plan);
    marlin(attention + "o_proj", {c.d_model}, q_size, {&layer.o}, plan);
    marlin(mlp + "gate_up_proj", {c.d_ff, c.d_ff}, c.d_model, {&layer.gate, &layer.up}, plan);
    marlin(mlp + "down_proj", {c.d_model}, c.d_ff, {&layer.down}, plan);
  } else {
    linear(attention + "q_proj", q_size, c.d_model, layer.q, plan);
    linear(attention + "k_proj", kv_size, c.d_model, layer.k, plan);
    linear(attention + "v_proj", kv_size, c.d_model, layer.v, plan);
    linear(attention + "o_proj", c.d_model, q_size, layer.o, plan);
    linear(mlp + "gate_proj", c.d_ff, c.d_model, layer.gate, plan);
    linear(mlp + "up_proj", c.d_ff, c.d_model, layer.up, plan);
    linear(mlp + "down_proj", c.d_model, c.d_ff, layer.down, plan);
  }
  if (c.attention_bias) {
    vector(attention + "q_proj.bias", q_size, &layer.q_bias, plan);
    vector(attention + "k_proj.bias", kv_size, &layer.k_bias, plan);
    vector(attention + "v_proj.bias", kv_size, &layer.v_bias, plan);
  }
  if (c.output_bias) vector(attention + "o_proj.bias", c.d_model, &layer.o_bias, plan);
  vector(prefix + "post_attention_layernorm.weight", c.d_model, &layer.post_attention_norm, plan);
}

void Weights::mtp_layer(const std::string& prefix, MtpLayer& layer, MemoryPlan& plan) {
  const int32_t width = config_.d_model;
  vector(prefix + "hidden_layernorm.weight", width, &layer.hidden_norm, plan);
  vector(prefix + "token_layernorm.weight", width, &layer.token_norm, plan);
  linear(prefix + "input_proj", width, 2 * width, layer.input_proj, plan);
  this->layer(prefix, layer.layer, plan);
  vector(prefix + "final_layernorm.weight", width, &layer.final_norm, plan);
}

void Weights::check_nothing_is_left() {
  const std::string buffer = "rotary_emb.inv_freq";  // a constant that old versions of transformers saved
  const bool leaves_mtp = config_.num_nextn_predict_layers > 0 && mtp_layers.empty();
  for (const std::string& name : files_.names()) {
    if (used_.count(name) > 0 || (leaves_mtp && name.rfind("model.mtp_layers.", 0) == 0)) continue;
    const bool is_buffer =
        name.size() >= buffer.size() && name.compare(name.size() - buffer.size(), buffer.size(), buffer) == 0;
    if (is_buffer) continue;
    const bool tied_head = name == "lm_head.weight" && config_.tie_word_embeddings;
    if (!tied_head) fail("the weights have " + name + ", for which the model of config.json has no place");
    const Tensor& embedded = files_.get("model.embed_tokens.weight", {DType::kF32, DType::kF16, DType::kBF16},
                                        {config_.vocab_size, config_.d_model});
    const Tensor& given = files_.get(name, {embedded.dtype}, embedded.shape);
    if (std::memcmp(given.data, embedded.data, given.bytes) != 0) {
      fail("lm_head.weight differs from model.embed_tokens.weight, though config.json says tie_word_embeddings");
    }
  }
}

}  // namespace cpm
