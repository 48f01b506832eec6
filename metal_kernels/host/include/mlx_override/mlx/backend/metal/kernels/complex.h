// In place of MLX's file, which overloads methods by address space: no C++ compiler but Apple's can express that.
#pragma once
template <class T>
struct complex_t {
  T real, imag;
  constexpr complex_t(T real, T imag) : real(real), imag(imag) {}
  constexpr complex_t() : real(0), imag(0) {}
};
using complex32_t = complex_t<half>;
using complex64_t = complex_t<float>;
