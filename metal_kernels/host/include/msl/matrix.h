// simdgroup_matrix: 8x8 matrices spread over the 32 lanes of a SIMD-group.
// The target defines msl_lane() and msl_matrix_access(name) before it includes this file, and
// msl_multiply_accumulate(d, a, b, c) before or after.
#pragma once

namespace metal {
// A lane owns (row, column) and (row, column + 1), where MLX's BaseMMAFrag has them.
MSL_INLINE constexpr uint msl_matrix_row(uint lane) { return ((lane / 4) & 4) + ((lane / 2) & 3); }
MSL_INLINE constexpr uint msl_matrix_column(uint lane) { return ((lane / 4) & 2) * 2 + (lane & 1) * 2; }

template <class T, int Rows, int Columns> struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "simdgroup_matrix: only 8x8 exists");
  vec<T, 2> elements;

  simdgroup_matrix() = default;
  MSL_INLINE explicit simdgroup_matrix(T diagonal) {
    const uint row = msl_matrix_row(msl_lane()), column = msl_matrix_column(msl_lane());
    elements.x = row == column ? diagonal : T(0.0f);
    elements.y = row == column + 1 ? diagonal : T(0.0f);
  }
  MSL_INLINE vec<T, 2>& thread_elements() { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Rows, int Columns>
MSL_INLINE simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> filled;
  filled.elements = vec<T, 2>(value, value);
  return filled;
}

// Where element (row, column) of a matrix in memory is; `transposed` swaps the two.
MSL_INLINE ulong msl_matrix_offset(ulong row, ulong column, ulong per_row, vec<ulong, 2> origin, bool transposed) {
  return transposed ? (origin.y + column) * per_row + origin.x + row : (origin.y + row) * per_row + origin.x + column;
}
template <class T>
MSL_INLINE void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, const T* source, ulong elements_per_row = 8,
                               vec<ulong, 2> origin = vec<ulong, 2>(0), bool transposed = false) {
  msl_matrix_access("simdgroup_load");
  const ulong row = msl_matrix_row(msl_lane()), column = msl_matrix_column(msl_lane());
  matrix.elements.x = source[msl_matrix_offset(row, column, elements_per_row, origin, transposed)];
  matrix.elements.y = source[msl_matrix_offset(row, column + 1, elements_per_row, origin, transposed)];
}
template <class T>
MSL_INLINE void simdgroup_store(simdgroup_matrix<T, 8, 8> matrix, T* destination, ulong elements_per_row = 8,
                                vec<ulong, 2> origin = vec<ulong, 2>(0), bool transposed = false) {
  msl_matrix_access("simdgroup_store");
  const ulong row = msl_matrix_row(msl_lane()), column = msl_matrix_column(msl_lane());
  destination[msl_matrix_offset(row, column, elements_per_row, origin, transposed)] = matrix.elements.x;
  destination[msl_matrix_offset(row, column + 1, elements_per_row, origin, transposed)] = matrix.elements.y;
}
template <class D, class A, class B, class C>
MSL_INLINE void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                              simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c) {
  msl_multiply_accumulate(d, a, b, c);
}
template <class D, class A, class B>
MSL_INLINE void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b) {
  msl_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0.0f)));
}
}  // namespace metal
