// In place of MLX's file: bfloat is ours here.
#pragma once
inline uint16_t bfloat16_to_uint16(const bfloat x) { return as_type<uint16_t>(x); }
inline bfloat uint16_to_bfloat16(const uint16_t x) { return as_type<bfloat>(x); }
