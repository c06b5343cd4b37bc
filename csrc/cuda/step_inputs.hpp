#pragma once

#include "ops/step_inputs.hpp"

namespace foretoken::cuda {

void write_step_inputs(const StepInputsArgs& args, Device device, Stream stream);
void draft_ngrams(const NgramDraftsArgs& args, Device device, Stream stream);
void last_logits(const LastLogitsArgs& args, Device device, Stream stream);

}  // namespace foretoken::cuda
