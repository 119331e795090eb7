// SentencePiece's BPE as tokenizer.json describes it: that of Llama 2, Mistral and MiniCPM4.
#pragma once

#include <memory>

#include "text.h"

// Throws where SentencePiece would give other ids than the merges, or the text is treated in a way that is not known.
std::unique_ptr<TextTokenizer> sentencepiece_tokenizer(const cpm::Json& json);
