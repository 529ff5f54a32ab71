// Which instruction-set tiers this processor can run, and the one in use.
#pragma once

namespace cgpt {

// In the order of preference; `auto` never picks amx_emulated, which runs the AMX source on tiles
// emulated in software so that it can be tested on processors without AMX.
enum class Isa : int { scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx, amx_emulated, count };

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

// The tier that kernels run. First call: the best supported one, or CGPT_CPU_ISA's. Throws
// std::invalid_argument when CGPT_CPU_ISA names an unknown or unsupported tier.
Isa active_isa();

// Forces a tier by name for the whole process; "auto" returns to the default. Throws
// std::invalid_argument for an unknown or unsupported name and then changes nothing.
void set_isa(const char* name);

}  // namespace cgpt
