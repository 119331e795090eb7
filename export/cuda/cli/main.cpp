// cpm FOLDER --ids 1,2,3: generates from an exported folder. Takes and prints token ids, or text where it was
// built with a tokenizer.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpm.h"
#include "draft_tree.h"
#include "sampler.h"
#ifdef CPM_TOKENIZERS
#include "text.h"
#endif

namespace {

constexpr int64_t kLargestTree = 64;

constexpr char kUsage[] =
    "cpm FOLDER [--ids 1,2,3 | --ids-file FILE | --prompt TEXT] [options]\n"
    "  --ids LIST           token ids of the prompt, separated by commas or spaces\n"
    "  --ids-file FILE      the same from a file\n"
    "  --prompt TEXT        text instead of ids, then printed as text; where it was built with CPM_TOKENIZERS\n"
    "  --max-new-tokens N   how many tokens to generate (default 0); a token that ends a text ends it\n"
    "  --temperature T      0 takes the most probable token (default); else it is drawn from the logits over T\n"
    "  --top-k N            of the N most probable tokens (default 0: all)\n"
    "  --top-p P            of the smallest set of most probable tokens with at least this probability (default 1)\n"
    "  --seed N             of the draws (default 0)\n"
    "  --draft N            verify trees of up to N tokens at once, drafted from how the text went on before; the\n"
    "                       tokens are the same (default 0: one at a time; at most 64)\n"
    "  --mtp                the model's MTP layers draft the first tokens of a tree\n"
    "  --ignore-eos         go on after such a token\n"
    "  --capacity N         tokens that the KV cache holds (default: max_position_embeddings)\n"
    "  --chunk N            prompt tokens computed together (default 128)\n"
    "  --threads N          of the CPU (default: one for each core)\n"
    "  --backend NAME       cpu, or cuda where it was built with it\n"
    "  --logits FILE        write the logits after every token of the prompt, float32 [tokens, vocabulary]\n"
    "Generated ids go to standard output; the memory plan and the speed to standard error.\n";

struct Arguments {
  std::string folder, logits_file, backend = "cpu", prompt;
  bool has_prompt = false;
  std::vector<int32_t> ids;
  int64_t max_new_tokens = 0, draft = 0;
  bool ignore_eos = false, mtp = false;
  Sampling sampling;
  cpm_options options{};
  std::function<std::string(int32_t)> decode;  // where text is printed
};

class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

int64_t whole(const std::string& name, const std::string& text, int64_t highest) {
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || errno != 0 || value < 0 || value > highest) {
    throw UsageError(name + " = " + text + ": accepted are whole numbers from 0 to " + std::to_string(highest));
  }
  return value;
}

double number(const std::string& name, const std::string& text, double lowest, double highest, const char* accepted) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value >= lowest && value <= highest)) {
    throw UsageError(name + " = " + text + ": accepted are numbers " + accepted);
  }
  return value;
}

std::vector<int32_t> parse_ids(const std::string& name, std::string text) {
  std::replace(text.begin(), text.end(), ',', ' ');
  std::istringstream words(text);
  std::vector<int32_t> ids;
  for (std::string word; words >> word;) ids.push_back(static_cast<int32_t>(whole(name, word, INT32_MAX)));
  return ids;
}

std::string read_text(const std::string& file) {
  std::ifstream stream(file);
  std::ostringstream text;
  if (!(text << stream.rdbuf())) throw UsageError("--ids-file " + file + " cannot be read, or is empty");
  return text.str();
}

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) throw UsageError(name + " needs a value");
      return argv[++i];
    };
    if (name == "--help") {
      std::printf("%s", kUsage);
      std::exit(0);
    } else if (name == "--ids") {
      arguments.ids = parse_ids(name, value());
    } else if (name == "--ids-file") {
      arguments.ids = parse_ids(name, read_text(value()));
    } else if (name == "--prompt") {
      arguments.prompt = value();
      arguments.has_prompt = true;
    } else if (name == "--max-new-tokens") {
      arguments.max_new_tokens = whole(name, value(), INT32_MAX);
    } else if (name == "--temperature") {
      arguments.sampling.temperature = number(name, value(), 0, 1e6, "from 0 to 1000000");
    } else if (name == "--top-k") {
      arguments.sampling.top_k = whole(name, value(), INT32_MAX);
    } else if (name == "--top-p") {
      arguments.sampling.top_p = number(name, value(), 1e-9, 1, "above 0, at most 1");
    } else if (name == "--seed") {
      arguments.sampling.seed = static_cast<uint64_t>(whole(name, value(), INT64_MAX));
    } else if (name == "--draft") {
      arguments.draft = whole(name, value(), kLargestTree);
    } else if (name == "--mtp") {
      arguments.mtp = true;
    } else if (name == "--ignore-eos") {
      arguments.ignore_eos = true;
    } else if (name == "--capacity") {
      arguments.options.capacity = whole(name, value(), INT32_MAX);
    } else if (name == "--chunk") {
      arguments.options.chunk = static_cast<int32_t>(whole(name, value(), INT32_MAX));
    } else if (name == "--threads") {
      arguments.options.threads = static_cast<int32_t>(whole(name, value(), INT32_MAX));
    } else if (name == "--backend") {
      arguments.backend = value();
    } else if (name == "--logits") {
      arguments.logits_file = value();
    } else if (name.rfind("--", 0) == 0 || !arguments.folder.empty()) {
      throw UsageError(name + " is not known");
    } else {
      arguments.folder = name;
    }
  }
  if (arguments.folder.empty()) throw UsageError("FOLDER is missing");
  const bool has_work = arguments.max_new_tokens > 0 || !arguments.logits_file.empty();
  if (has_work && arguments.ids.empty() && !arguments.has_prompt) {
    throw UsageError("--max-new-tokens or --logits without token ids: --ids, --ids-file or --prompt gives them");
  }
  if (arguments.sampling.temperature > 0 && (arguments.draft > 0 || arguments.mtp)) {
    throw UsageError("--temperature with --draft or --mtp: drafts are verified against the most probable tokens");
  }
  return arguments;
}

void check(int32_t result) {
  if (result != 0) throw std::runtime_error(cpm_last_error());
}

void print_plan(const cpm_model* model) {
  cpm_plan plan;
  cpm_memory_plan(model, &plan);
  constexpr double kMega = 1e6;
  std::fprintf(stderr,
               "weights mapped %.2f MB; pool %.2f MB = weights %.2f + activations %.2f + KV cache %.2f, for %" PRId64
               " tokens, %s attention\n",
               plan.mapped_bytes / kMega, plan.pool_bytes / kMega, plan.weights_bytes / kMega,
               plan.activations_bytes / kMega, plan.cache_bytes / kMega, plan.capacity,
               plan.sparse ? "sparse" : "dense");
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void print_speed(const char* what, int64_t tokens, double seconds) {
  std::fprintf(stderr, "%s: %" PRId64 " tokens in %.3f s, %.2f tokens/s\n", what, tokens, seconds,
               static_cast<double>(tokens) / std::max(seconds, 1e-9));
}

// The prompt; returns the logits after its last token.
std::vector<float> read_prompt(cpm_model* model, const Arguments& arguments) {
  const auto vocabulary = static_cast<size_t>(cpm_vocab_size(model));
  const auto count = static_cast<int64_t>(arguments.ids.size());
  std::vector<float> last(vocabulary);
  if (arguments.logits_file.empty()) {
    check(cpm_prefill(model, arguments.ids.data(), count, last.data()));
    return last;
  }
  std::vector<float> each(vocabulary * arguments.ids.size());
  check(cpm_score(model, arguments.ids.data(), count, each.data()));
  std::ofstream file(arguments.logits_file, std::ios::binary);
  file.write(reinterpret_cast<const char*>(each.data()), static_cast<std::streamsize>(each.size() * sizeof(float)));
  if (!file.flush()) throw std::runtime_error("--logits " + arguments.logits_file + " cannot be written");
  std::copy(each.end() - static_cast<std::ptrdiff_t>(vocabulary), each.end(), last.begin());
  return last;
}

// Prints tokens until there are enough of them, or one ends the text.
class Output {
 public:
  Output(const cpm_model* model, const Arguments& arguments)
      : model_(model), arguments_(arguments), left_(arguments.max_new_tokens) {}

  // Whether more are wanted.
  bool add(int32_t token) {
    if (arguments_.decode) {
      const std::string text = arguments_.decode(token);
      std::fwrite(text.data(), 1, text.size(), stdout);  // a byte of 0 among them
    } else {
      std::printf("%s%" PRId32, first_ ? "" : " ", token);
    }
    std::fflush(stdout);
    first_ = false;
    --left_;
    done_ = left_ == 0 || (!arguments_.ignore_eos && cpm_is_eos(model_, token));
    if (done_) std::printf("\n");
    return !done_;
  }

 private:
  const cpm_model* model_;
  const Arguments& arguments_;
  int64_t left_;
  bool first_ = true, done_ = false;
};

void generate(cpm_model* model, const Arguments& arguments, std::vector<float> logits) {
  Output output(model, arguments);
  Sampler sampler(arguments.sampling);
  for (int32_t token = sampler.draw(logits); output.add(token); token = sampler.draw(logits)) {
    check(cpm_decode(model, token, logits.data()));
  }
}

void generate_by_drafts(cpm_model* model, const Arguments& arguments, std::vector<float> logits, int64_t capacity) {
  Output output(model, arguments);
  std::vector<int32_t> text = arguments.ids, accepted(kLargestTree);
  const int32_t mtp_layers = cpm_mtp_layers(model);
  std::vector<int32_t> drafts(static_cast<size_t>(mtp_layers));
  int64_t passes = 0, kept = 0;
  for (bool more = true; more;) {
    text.push_back(most_probable(logits));
    if (!output.add(text.back())) break;
    const int64_t most = std::max<int64_t>(arguments.draft, mtp_layers + 1);
    const auto room = static_cast<size_t>(std::max<int64_t>(std::min(most, capacity - cpm_length(model)), 1));
    DraftTree tree{{text.back()}, {-1}};
    if (mtp_layers > 0) {
      const int32_t drafted = cpm_draft(model, text.back(), drafts.data());
      if (drafted < 0) throw std::runtime_error(cpm_last_error());
      tree.add(drafts.begin(), drafts.begin() + drafted, room);
    }
    if (arguments.draft > 0) look_up(text, room, tree);
    const auto count = static_cast<int32_t>(tree.tokens.size());
    const int32_t number =
        cpm_verify_tree(model, tree.tokens.data(), tree.parents.data(), count, accepted.data(), logits.data());
    if (number < 0) throw std::runtime_error(cpm_last_error());
    ++passes;
    kept += number - 1;
    for (int32_t i = 1; more && i < number; ++i) {
      text.push_back(tree.tokens[static_cast<size_t>(accepted[static_cast<size_t>(i)])]);
      more = output.add(text.back());
    }
  }
  std::fprintf(stderr, "drafts: %" PRId64 " tokens accepted in %" PRId64 " passes, %.2f tokens a pass\n", kept, passes,
               1 + static_cast<double>(kept) / static_cast<double>(std::max<int64_t>(passes, 1)));
}

// Takes text for what it is where there is a tokenizer.
void read_text_prompt(Arguments& arguments) {
#ifdef CPM_TOKENIZERS
  const std::shared_ptr<TextTokenizer> tokenizer = open_tokenizer(arguments.folder);
  arguments.ids = tokenizer->encode(arguments.prompt);
  if (arguments.ids.empty()) throw UsageError("--prompt: the text has no tokens");
  arguments.decode = [tokenizer](int32_t token) { return tokenizer->decode(token); };
#else
  throw UsageError("--prompt " + arguments.prompt + ": this program was built without CPM_TOKENIZERS; give --ids");
#endif
}

// The last token is not computed with, so it needs no slot. Whether a text ends earlier is not known beforehand.
void check_room(const cpm_model* model, const Arguments& arguments) {
  cpm_plan plan;
  cpm_memory_plan(model, &plan);
  const auto prompt = static_cast<int64_t>(arguments.ids.size());
  const int64_t needed = prompt + arguments.max_new_tokens - 1;
  if (needed <= plan.capacity) return;
  throw UsageError("--max-new-tokens = " + std::to_string(arguments.max_new_tokens) + ": after a prompt of " +
                   std::to_string(prompt) + " tokens the cache needs " + std::to_string(needed) +
                   " slots; its capacity (--capacity) is " + std::to_string(plan.capacity));
}

void run(Arguments arguments) {
  if (arguments.has_prompt) read_text_prompt(arguments);
  cpm_options options = arguments.options;
  options.backend = arguments.backend.c_str();
  options.mtp = arguments.mtp ? 1 : 0;
  const std::unique_ptr<cpm_model, decltype(&cpm_close)> model(cpm_open(arguments.folder.c_str(), &options), cpm_close);
  if (model == nullptr) throw std::runtime_error(cpm_last_error());
  if (arguments.mtp && cpm_mtp_layers(model.get()) == 0) {
    throw UsageError("--mtp: the model has no MTP layers; those of the layout mimo may have");
  }
  if (arguments.max_new_tokens > 0) check_room(model.get(), arguments);
  print_plan(model.get());
  if (arguments.ids.empty()) return;
  auto start = std::chrono::steady_clock::now();
  std::vector<float> logits = read_prompt(model.get(), arguments);
  print_speed("prompt", cpm_length(model.get()), seconds_since(start));
  if (arguments.max_new_tokens == 0) return;
  const int64_t before = cpm_length(model.get());
  start = std::chrono::steady_clock::now();
  if (arguments.draft > 0 || arguments.mtp) {
    cpm_plan plan;
    cpm_memory_plan(model.get(), &plan);
    generate_by_drafts(model.get(), arguments, std::move(logits), plan.capacity);
  } else {
    generate(model.get(), arguments, std::move(logits));
  }
  print_speed("generated", cpm_length(model.get()) - before, seconds_since(start));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "cpm: %s\n\n%s", error.what(), kUsage);
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cpm: %s\n", error.what());
    return 1;
  }
}
