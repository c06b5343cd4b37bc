#pragma once

namespace foretoken::cpu {

// Whether the processor has matrix tiles of bfloat16 and the system lets this process use them, which it is
// asked for here: their registers are 8 KB a thread.
bool amx_is_usable();

// Vectors of AVX-512 narrowed to bfloat16, which every processor with AMX can.
bool has_avx512_bf16();

}  // namespace foretoken::cpu
