#pragma once

#include "ops/step_inputs.hpp"

namespace foretoken::cpu {

void write_step_inputs(const StepInputsArgs& args);
void draft_ngrams(const NgramDraftsArgs& args);
void last_logits(const LastLogitsArgs& args);

}  // namespace foretoken::cpu
