// The bfloat type, for the host and the CUDA pass: float arithmetic rounded to nearest even after every operation.
// Only explicit conversions to it, as in MSL. Needs MSL_INLINE.
#pragma once
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  template <class T> MSL_INLINE constexpr explicit bfloat(T x) : bits(round(float(x))) {}
  MSL_INLINE constexpr operator float() const { return __builtin_bit_cast(float, (uint32_t)bits << 16); }

  MSL_INLINE static constexpr uint16_t round(float x) {
    const uint32_t all = __builtin_bit_cast(uint32_t, x);
    const bool is_nan = (all & 0x7fffffffu) > 0x7f800000u;
    return uint16_t(is_nan ? all >> 16 | 0x40 : (all + 0x7fffu + (all >> 16 & 1)) >> 16);
  }
};
#define MSL_BFLOAT_OPERATOR(op)                                                                              \
  MSL_INLINE constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }       \
  MSL_INLINE bfloat& operator op##=(bfloat& a, bfloat b) { return a = a op b; }
MSL_BFLOAT_OPERATOR(+)
MSL_BFLOAT_OPERATOR(-)
MSL_BFLOAT_OPERATOR(*)
MSL_BFLOAT_OPERATOR(/)
MSL_INLINE constexpr bfloat operator-(bfloat a) { return bfloat(-float(a)); }
