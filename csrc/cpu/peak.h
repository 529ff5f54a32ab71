// What a core and the memory can do at most, measured without any library: the roofs that bounds
// are taken from.
#pragma once

#include <cstddef>

namespace cgpt {

// Operations per second of the calling thread, a multiply-add counting 2, by the fastest
// instruction that the tier in use has for `format` ("fp32", "bf16", "int8"): the best of many
// short samples within `seconds`. 0 where the tier has none.
double peak_rate(const char* format, double seconds);

// Seconds in which the calling thread reads `bytes` (a multiple of 256) in order, `passes` times.
double read_seconds(const void* data, size_t bytes, int passes);

}  // namespace cgpt
