#include "config.h"

#include <algorithm>
#include <cmath>

#include "checked.h"
#include "json.h"

namespace cpm {
namespace {

constexpr int64_t kLargestInt = INT32_MAX;

bool one_of(const std::string& text, std::initializer_list<const char*> accepted) {
  return std::find(accepted.begin(), accepted.end(), text) != accepted.end();
}

int32_t size_field(const Json& json, const std::string& name) {
  return static_cast<int32_t>(json.get(name).whole(1, kLargestInt));
}

int64_t whole_or(const Json& json, const std::string& name, int64_t lowest, int64_t highest, int64_t otherwise) {
  return json.has(name) ? json.get(name).whole(lowest, highest) : otherwise;
}

double positive_or(const Json& json, const std::string& name, double otherwise) {
  return json.has(name) ? json.get(name).positive() : otherwise;
}

bool flag_or(const Json& json, const std::string& name, bool otherwise) {
  return json.has(name) ? json.get(name).flag() : otherwise;
}

// What would change the computation in a way that there is no code for.
void check_constants(const Json& hf) {
  for (const char* name : {"hidden_act", "hidden_activation"}) {
    if (hf.has(name) && !one_of(hf.get(name).text(), {"silu", "swish"})) hf.get(name).refuse("silu");
  }
  for (const char* name : {"mlp_bias", "use_sliding_window", "use_mrope", "use_qk_norm", "qk_layernorm"}) {
    if (hf.has(name) && hf.get(name).flag()) hf.get(name).refuse("false");
  }
  for (const char* name : {"num_experts", "num_local_experts", "n_routed_experts"}) whole_or(hf, name, 0, 0, 0);
  for (const char* name : {"attn_logit_softcapping", "final_logit_softcapping"}) {
    if (hf.has(name)) hf.get(name).refuse("null");
  }
  if (hf.has("partial_rotary_factor")) hf.get("partial_rotary_factor").number(1, 1);
  if (hf.has("layer_types")) {
    const Json types = hf.get("layer_types");
    for (size_t i = 0; i < types.size(); ++i) {
      if (types.at(i).text() != "full_attention") types.at(i).refuse("full_attention");
    }
  }
}

std::vector<double> factors(const Json& list, int32_t head_dim) {
  if (list.size() != static_cast<size_t>(head_dim) / 2) {
    fail(list.where() + " has " + std::to_string(list.size()) +
         " values: accepted are head_dim/2 = " + std::to_string(head_dim / 2));
  }
  std::vector<double> values;
  for (size_t i = 0; i < list.size(); ++i) values.push_back(list.at(i).positive());
  return values;
}

double longrope_attention_factor(double scale, int64_t original) {
  return scale > 1 ? std::sqrt(1 + std::log(scale) / std::log(static_cast<double>(original))) : 1.0;
}

// Reads rope_theta and rope_scaling, or rope_parameters; dynamic NTK lengthens max_position_embeddings.
void read_rope(const Json& hf, Config& config) {
  Rope& rope = config.rope;
  const char* where = hf.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  rope.theta = positive_or(hf, "rope_theta", rope.theta);
  if (!hf.has(where)) return;
  const Json entries = hf.get(where);
  rope.theta = positive_or(entries, "rope_theta", rope.theta);
  const char* named = entries.has("rope_type") ? "rope_type" : "type";
  if (entries.has(named)) rope.type = entries.get(named).text();
  if (!one_of(rope.type, {"default", "linear", "dynamic", "yarn", "longrope", "llama3"})) {
    entries.get(named).refuse("default, linear, dynamic, yarn, longrope or llama3");
  }
  if (entries.has("partial_rotary_factor")) entries.get("partial_rotary_factor").number(1, 1);
  for (const char* name : {"mscale", "mscale_all_dim"}) {
    if (entries.has(name)) entries.get(name).refuse("null; write attention_factor instead");
  }
  const int64_t longest = config.max_position_embeddings;
  if (rope.type == "default") return;
  if (rope.type == "longrope") {
    rope.short_factor = factors(entries.get("short_factor"), config.head_dim);
    rope.long_factor = factors(entries.get("long_factor"), config.head_dim);
  } else if (rope.type != "yarn" || entries.has("factor")) {
    rope.factor = entries.get("factor").number(1, static_cast<double>(kLongestSequence));
  }
  if (rope.type == "linear") return;
  if (rope.type == "dynamic") {
    if (config.head_dim < 4) fail("config.json: head_dim = 2: dynamic NTK needs at least 4");
    rope.original_max_position_embeddings = longest;
    const double stretched = std::floor(static_cast<double>(longest) * rope.factor);
    config.max_position_embeddings = static_cast<int64_t>(std::min(stretched, static_cast<double>(kLongestSequence)));
    return;
  }
  const Json& holder = hf.has("original_max_position_embeddings") ? hf : entries;
  const int64_t original = whole_or(holder, "original_max_position_embeddings", 2, kLongestSequence, longest);
  rope.original_max_position_embeddings = original;
  const double scale = static_cast<double>(longest) / static_cast<double>(original);
  if (rope.type == "longrope") {
    const double declared = positive_or(entries, "factor", scale);
    rope.attention_factor = positive_or(entries, "attention_factor", longrope_attention_factor(declared, original));
  } else if (rope.type == "yarn") {
    if (!entries.has("factor")) rope.factor = std::max(scale, 1.0);
    rope.beta_fast = positive_or(entries, "beta_fast", rope.beta_fast);
    rope.beta_slow = positive_or(entries, "beta_slow", rope.beta_slow);
    if (rope.beta_fast <= rope.beta_slow) entries.get("beta_fast").refuse("more than beta_slow");
    rope.truncate = flag_or(entries, "truncate", true);
    rope.attention_factor = positive_or(entries, "attention_factor", 0.1 * std::log(rope.factor) + 1);
  } else {
    rope.low_freq_factor = entries.get("low_freq_factor").positive();
    rope.high_freq_factor = entries.get("high_freq_factor").positive();
    if (rope.high_freq_factor <= rope.low_freq_factor)
      entries.get("high_freq_factor").refuse("more than low_freq_factor");
  }
}

Sparse read_sparse(const Json& entries) {
  Sparse sparse;
  for (const std::string& name : entries.names()) {
    if (!one_of(name, {"kernel_size", "kernel_stride", "init_blocks", "block_size", "window_size", "topk", "use_nope",
                       "dense_len", "variant", "lse_approximation"})) {
      fail(entries.where() + " has " + name + ", which is not computed");
    }
  }
  const auto size = [&entries](const char* name, int64_t lowest, int64_t& field) {
    field = whole_or(entries, name, lowest, kLongestSequence, field);
  };
  const auto refuse = [&entries](const char* name, int64_t value, const std::string& accepted) {
    fail(entries.where() + ": " + name + " = " + std::to_string(value) + ": accepted is " + accepted);
  };
  size("kernel_stride", 1, sparse.kernel_stride);
  size("kernel_size", 1, sparse.kernel_size);
  size("init_blocks", 0, sparse.init_blocks);
  size("block_size", 1, sparse.block_size);
  size("window_size", 1, sparse.window_size);
  size("topk", 1, sparse.topk);
  size("dense_len", -1, sparse.dense_len);
  sparse.use_nope = flag_or(entries, "use_nope", sparse.use_nope);
  sparse.lse_approximation = flag_or(entries, "lse_approximation", sparse.lse_approximation);
  if (entries.has("variant")) {
    const std::string variant = entries.get("variant").text();
    if (!one_of(variant, {"huggingface", "paper", "cpm_cu"}))
      entries.get("variant").refuse("huggingface, paper or cpm_cu");
    sparse.extra_local_block = variant == "huggingface";
  }
  if (sparse.kernel_size < sparse.kernel_stride) {
    refuse("kernel_size", sparse.kernel_size, "at least kernel_stride = " + std::to_string(sparse.kernel_stride));
  }
  if (sparse.block_size % sparse.kernel_stride) {
    refuse("block_size", sparse.block_size, "a multiple of kernel_stride = " + std::to_string(sparse.kernel_stride));
  }
  if (sparse.window_size % sparse.block_size) {
    refuse("window_size", sparse.window_size, "a multiple of block_size = " + std::to_string(sparse.block_size));
  }
  if (sparse.topk < sparse.init_blocks || sparse.num_selected() < sparse.init_blocks + sparse.num_local()) {
    refuse("topk", sparse.topk, "more than init_blocks = " + std::to_string(sparse.init_blocks));
  }
  return sparse;
}

Quantization read_quantization(const Json& entries) {
  if (entries.names().empty()) return {};
  if (entries.get("quant_method").text() != "gptq") entries.get("quant_method").refuse("gptq");
  entries.get("bits").whole(4, 4);
  if (entries.has("checkpoint_format") && entries.get("checkpoint_format").text() != "gptq") {
    entries.get("checkpoint_format").refuse("gptq");
  }
  for (const char* name : {"desc_act", "lm_head"}) {
    if (flag_or(entries, name, false)) entries.get(name).refuse("false");
  }
  const Json group_size = entries.get("group_size");
  const auto size = static_cast<int32_t>(group_size.whole(-1, kLargestInt));
  if (size == 0) group_size.refuse("a number of inputs above 0, or -1 for all of them");
  return {size};
}

// Factors of MiniCPM, or of Granite, which has the same under other names.
void read_multipliers(const Json& hf, const std::string& model_type, Config& config) {
  const double layers = config.num_layers, width = config.d_model;
  config.attention_multiplier = 1 / std::sqrt(static_cast<double>(config.head_dim));
  if (model_type == "minicpm") {
    config.embedding_multiplier = positive_or(hf, "scale_emb", 1);
    config.residual_multiplier = positive_or(hf, "scale_depth", 1) / std::sqrt(layers);
    config.logits_multiplier = positive_or(hf, "dim_model_base", 1) / width;
  } else if (model_type == "granite") {
    config.embedding_multiplier = positive_or(hf, "embedding_multiplier", 1);
    config.residual_multiplier = positive_or(hf, "residual_multiplier", 1);
    config.logits_multiplier = 1 / positive_or(hf, "logits_scaling", 1);
    config.attention_multiplier = positive_or(hf, "attention_multiplier", 1);
  }
}

std::vector<int32_t> eos_token_ids(const Json& json) {
  std::vector<int32_t> ids;
  if (!json.has("eos_token_id")) return ids;
  const Json entry = json.get("eos_token_id");
  if (!entry.is_array()) return {static_cast<int32_t>(entry.whole(0, kLargestInt))};
  for (size_t i = 0; i < entry.size(); ++i) ids.push_back(static_cast<int32_t>(entry.at(i).whole(0, kLargestInt)));
  return ids;
}

// Share of interpolation of each pair of dimensions, before clipping; linear in the index of the pair.
std::vector<double> yarn_ramp(const Rope& rope, int32_t half) {
  const auto dimension = [&rope, half](double turns) {
    const double wavelength = static_cast<double>(rope.original_max_position_embeddings) / turns;
    return half * std::log(wavelength / (2 * M_PI)) / std::log(rope.theta);
  };
  double low = dimension(rope.beta_fast), high = dimension(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, 2.0 * half - 1);
  std::vector<double> ramp(static_cast<size_t>(half));
  for (int32_t i = 0; i < half; ++i) ramp[static_cast<size_t>(i)] = (i - low) / std::max(high - low, 0.001);
  return ramp;
}

}  // namespace

std::vector<double> inverse_frequencies(const Rope& rope, int32_t head_dim, int64_t length) {
  const int32_t half = head_dim / 2;
  const double original = static_cast<double>(rope.original_max_position_embeddings);
  double theta = rope.theta;
  if (rope.type == "dynamic") {
    // The slowest frequency falls as if positions were interpolated.
    const double stretch = rope.factor * std::max(static_cast<double>(length) / original, 1.0) - (rope.factor - 1);
    theta *= std::pow(stretch, half / (half - 1.0));
  }
  std::vector<double> ramp;
  if (rope.type == "yarn") ramp = yarn_ramp(rope, half);
  const auto& divisors = length > rope.original_max_position_embeddings ? rope.long_factor : rope.short_factor;
  std::vector<double> frequencies;
  for (int32_t i = 0; i < half; ++i) {
    const auto index = static_cast<size_t>(i);
    const double plain = std::pow(theta, -static_cast<double>(i) / half);
    double kept = 1;  // share that is not interpolated
    if (rope.type == "linear") kept = 0;
    if (rope.type == "yarn") kept = 1 - ramp[index];
    if (rope.type == "llama3") {
      const double turns = original * plain / (2 * M_PI);
      kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
    }
    kept = std::min(std::max(kept, 0.0), 1.0);
    const double scaled = plain * kept + plain / rope.factor * (1 - kept);
    frequencies.push_back(rope.type == "longrope" ? plain / divisors[index] : scaled);
  }
  return frequencies;
}

Config read_config(const std::filesystem::path& folder) {
  const Json hf = Json::read(folder / "config.json");
  const std::string model_type = hf.get("model_type").text();
  if (!one_of(model_type, {"llama", "qwen2", "granite", "minicpm", "mimo"})) {
    hf.get("model_type")
        .refuse("llama, qwen2, granite, minicpm or mimo; export the model again in the layout of one of them");
  }
  check_constants(hf);
  Config config;
  config.vocab_size = size_field(hf, "vocab_size");
  config.num_layers = size_field(hf, "num_hidden_layers");
  config.d_model = size_field(hf, "hidden_size");
  config.d_ff = size_field(hf, "intermediate_size");
  config.num_heads = size_field(hf, "num_attention_heads");
  config.num_kv_heads = hf.has("num_key_value_heads") ? size_field(hf, "num_key_value_heads") : config.num_heads;
  if (config.num_heads % config.num_kv_heads) {
    hf.get("num_key_value_heads").refuse("a divisor of num_attention_heads = " + std::to_string(config.num_heads));
  }
  if (!hf.has("head_dim") && config.d_model % config.num_heads) {
    hf.get("hidden_size").refuse("a multiple of num_attention_heads, or head_dim beside it");
  }
  config.head_dim = hf.has("head_dim") ? size_field(hf, "head_dim") : config.d_model / config.num_heads;
  if (config.head_dim % 2)
    fail("config.json: head_dim = " + std::to_string(config.head_dim) + ": accepted are even numbers");
  const bool qkv_bias = model_type == "qwen2" || model_type == "mimo";  // and no other
  if (model_type == "mimo") {
    config.num_nextn_predict_layers =
        static_cast<int32_t>(whole_or(hf, "num_nextn_predict_layers", 0, kMostMtpLayers, 0));
    if (config.d_model > kLargestInt / 2) hf.get("hidden_size").refuse("at most half of 31 bits");
  }
  const int64_t usual_length = qkv_bias ? 32768 : 2048;
  config.max_position_embeddings = whole_or(hf, "max_position_embeddings", 1, kLongestSequence, usual_length);
  config.rms_norm_eps = positive_or(hf, "rms_norm_eps", 1e-6);
  config.tie_word_embeddings = flag_or(hf, "tie_word_embeddings", model_type == "minicpm");
  config.attention_bias = qkv_bias || flag_or(hf, "attention_bias", false);
  config.output_bias = !qkv_bias && config.attention_bias;
  read_multipliers(hf, model_type, config);
  read_rope(hf, config);
  if (hf.has("sparse_config") && !hf.get("sparse_config").names().empty()) {
    config.sparse = read_sparse(hf.get("sparse_config"));
  }
  if (hf.has("quantization_config")) config.quantization = read_quantization(hf.get("quantization_config"));
  const auto generation_file = folder / "generation_config.json";
  if (std::filesystem::exists(generation_file)) config.eos_token_ids = eos_token_ids(Json::read(generation_file));
  if (config.eos_token_ids.empty()) config.eos_token_ids = eos_token_ids(hf);
  return config;
}

}  // namespace cpm
