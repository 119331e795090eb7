// The weights of a decoder by their names in the files, in every packing that the verb `export` writes.
#pragma once

#include <deque>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "backend.h"
#include "config.h"
#include "memory_plan.h"
#include "safetensors.h"

namespace cpm {

struct Layer {
  const float* input_norm;
  Matrix q, k, v, o;
  const float *q_bias, *k_bias, *v_bias, *o_bias;  // NULL where there are none
  const float* post_attention_norm;
  Matrix gate, up, down;
};

// A layer that predicts one token further ahead than the hidden states that it is given.
struct MtpLayer {
  const float *hidden_norm, *token_norm;
  Matrix input_proj;  // of both, side by side
  Layer layer;
  const float* final_norm;
};

class Weights {
 public:
  // Finds and checks every tensor, and plans the copies that the backend needs. A tensor that the model has no place
  // for is an error, too: the file would not be what config.json says. MTP layers are left where they are unless `mtp`.
  Weights(const TensorFiles& files, const Config& config, bool mtp, const Backend& backend, MemoryPlan& plan);
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

  // Fills the copies, once the pool is allocated.
  void load(Backend& backend);

  // Bytes of the weights that are read where the files are mapped.
  uint64_t mapped_bytes() const { return mapped_bytes_; }

  Matrix embedding, head;
  const float* norm = nullptr;
  std::deque<Layer> layers;  // whose addresses stay, as the plan writes to them
  std::deque<MtpLayer> mtp_layers;

 private:
  // A part of a file for *place: as it lies there, or copied to the pool if the backend cannot read it there.
  template <typename T>
  void place(const Tensor& tensor, const std::string& name, const T** place, MemoryPlan& plan);

  const Tensor& find(const std::string& name, std::initializer_list<DType> dtypes, const std::vector<int64_t>& shape);
  void vector(const std::string& name, int32_t size, const float** place, MemoryPlan& plan);
  void plain(const std::string& name, int32_t rows, int32_t columns, Matrix& matrix, MemoryPlan& plan);
  void linear(const std::string& name, int32_t rows, int32_t columns, Matrix& matrix, MemoryPlan& plan);
  void gptq(const std::string& name, int32_t rows, int32_t columns, Matrix& matrix, MemoryPlan& plan);
  void marlin(const std::string& name, const std::vector<int32_t>& rows, int32_t columns,
              const std::vector<Matrix*>& matrices, MemoryPlan& plan);
  void layer(const std::string& prefix, Layer& layer, MemoryPlan& plan);
  void mtp_layer(const std::string& prefix, MtpLayer& layer, MemoryPlan& plan);
  void check_nothing_is_left();

  const TensorFiles& files_;
  const Config& config_;
  const bool mapped_;
  uint64_t mapped_bytes_ = 0;
  std::set<std::string> used_;
  std::vector<std::function<void(Backend&)>> copies_;
};

}  // namespace cpm
