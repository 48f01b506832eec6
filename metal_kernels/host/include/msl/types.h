// float4, uint3, half2, ...: the names of the vector types.
#pragma once
namespace metal {
#define MSL_VECTOR_NAMES(name, T) \
  typedef vec<T, 2> name##2;      \
  typedef vec<T, 3> name##3;      \
  typedef vec<T, 4> name##4;
MSL_VECTOR_NAMES(float, float)
MSL_VECTOR_NAMES(half, half)
MSL_VECTOR_NAMES(bfloat, bfloat)
MSL_VECTOR_NAMES(int, int)
MSL_VECTOR_NAMES(uint, uint)
MSL_VECTOR_NAMES(short, short)
MSL_VECTOR_NAMES(ushort, ushort)
MSL_VECTOR_NAMES(char, signed char)
MSL_VECTOR_NAMES(uchar, uchar)
MSL_VECTOR_NAMES(long, long)
MSL_VECTOR_NAMES(ulong, ulong)
MSL_VECTOR_NAMES(bool, bool)
}  // namespace metal
typedef half float16_t;
typedef bfloat bfloat16_t;
