// The swizzles of a vector as members of its union: all pairs, the permutations and the repetitions of one component.
// Another combination is a compile error: add it here.
#pragma once
#define MSL_INDEX_x 0
#define MSL_INDEX_y 1
#define MSL_INDEX_z 2
#define MSL_INDEX_w 3
#define MSL_PAIR(T, W, a, b) swizzle<T, W, MSL_INDEX_##a, MSL_INDEX_##b> a##b;
#define MSL_TRIPLE(T, W, a, b, c) \
  swizzle<T, W, MSL_INDEX_##a, MSL_INDEX_##b, MSL_INDEX_##c> a##b##c;
#define MSL_QUAD(T, W, a, b, c, d) \
  swizzle<T, W, MSL_INDEX_##a, MSL_INDEX_##b, MSL_INDEX_##c, MSL_INDEX_##d> a##b##c##d;

#define MSL_SWIZZLES_2(T) \
  MSL_PAIR(T, 2, x, x) MSL_PAIR(T, 2, x, y) MSL_PAIR(T, 2, y, x) MSL_PAIR(T, 2, y, y) MSL_TRIPLE(T, 2, x, x, x) \
  MSL_TRIPLE(T, 2, y, y, y) MSL_QUAD(T, 2, x, x, x, x) MSL_QUAD(T, 2, y, y, y, y)

#define MSL_SWIZZLES_3(T) \
  MSL_PAIR(T, 3, x, x) MSL_PAIR(T, 3, x, y) MSL_PAIR(T, 3, x, z) MSL_PAIR(T, 3, y, x) MSL_PAIR(T, 3, y, y) \
  MSL_PAIR(T, 3, y, z) MSL_PAIR(T, 3, z, x) MSL_PAIR(T, 3, z, y) MSL_PAIR(T, 3, z, z) MSL_TRIPLE(T, 3, x, y, z) \
  MSL_TRIPLE(T, 3, x, z, y) MSL_TRIPLE(T, 3, y, x, z) MSL_TRIPLE(T, 3, y, z, x) MSL_TRIPLE(T, 3, z, x, y) \
  MSL_TRIPLE(T, 3, z, y, x) MSL_TRIPLE(T, 3, x, x, x) MSL_TRIPLE(T, 3, y, y, y) MSL_TRIPLE(T, 3, z, z, z) \
  MSL_QUAD(T, 3, x, x, x, x) MSL_QUAD(T, 3, y, y, y, y) MSL_QUAD(T, 3, z, z, z, z)

#define MSL_SWIZZLES_4(T) \
  MSL_PAIR(T, 4, x, x) MSL_PAIR(T, 4, x, y) MSL_PAIR(T, 4, x, z) MSL_PAIR(T, 4, x, w) MSL_PAIR(T, 4, y, x) \
  MSL_PAIR(T, 4, y, y) MSL_PAIR(T, 4, y, z) MSL_PAIR(T, 4, y, w) MSL_PAIR(T, 4, z, x) MSL_PAIR(T, 4, z, y) \
  MSL_PAIR(T, 4, z, z) MSL_PAIR(T, 4, z, w) MSL_PAIR(T, 4, w, x) MSL_PAIR(T, 4, w, y) MSL_PAIR(T, 4, w, z) \
  MSL_PAIR(T, 4, w, w) MSL_TRIPLE(T, 4, x, y, z) MSL_TRIPLE(T, 4, x, y, w) MSL_TRIPLE(T, 4, x, z, y) \
  MSL_TRIPLE(T, 4, x, z, w) MSL_TRIPLE(T, 4, x, w, y) MSL_TRIPLE(T, 4, x, w, z) MSL_TRIPLE(T, 4, y, x, z) \
  MSL_TRIPLE(T, 4, y, x, w) MSL_TRIPLE(T, 4, y, z, x) MSL_TRIPLE(T, 4, y, z, w) MSL_TRIPLE(T, 4, y, w, x) \
  MSL_TRIPLE(T, 4, y, w, z) MSL_TRIPLE(T, 4, z, x, y) MSL_TRIPLE(T, 4, z, x, w) MSL_TRIPLE(T, 4, z, y, x) \
  MSL_TRIPLE(T, 4, z, y, w) MSL_TRIPLE(T, 4, z, w, x) MSL_TRIPLE(T, 4, z, w, y) MSL_TRIPLE(T, 4, w, x, y) \
  MSL_TRIPLE(T, 4, w, x, z) MSL_TRIPLE(T, 4, w, y, x) MSL_TRIPLE(T, 4, w, y, z) MSL_TRIPLE(T, 4, w, z, x) \
  MSL_TRIPLE(T, 4, w, z, y) MSL_TRIPLE(T, 4, x, x, x) MSL_TRIPLE(T, 4, y, y, y) MSL_TRIPLE(T, 4, z, z, z) \
  MSL_TRIPLE(T, 4, w, w, w) MSL_QUAD(T, 4, x, y, z, w) MSL_QUAD(T, 4, x, y, w, z) MSL_QUAD(T, 4, x, z, y, w) \
  MSL_QUAD(T, 4, x, z, w, y) MSL_QUAD(T, 4, x, w, y, z) MSL_QUAD(T, 4, x, w, z, y) MSL_QUAD(T, 4, y, x, z, w) \
  MSL_QUAD(T, 4, y, x, w, z) MSL_QUAD(T, 4, y, z, x, w) MSL_QUAD(T, 4, y, z, w, x) MSL_QUAD(T, 4, y, w, x, z) \
  MSL_QUAD(T, 4, y, w, z, x) MSL_QUAD(T, 4, z, x, y, w) MSL_QUAD(T, 4, z, x, w, y) MSL_QUAD(T, 4, z, y, x, w) \
  MSL_QUAD(T, 4, z, y, w, x) MSL_QUAD(T, 4, z, w, x, y) MSL_QUAD(T, 4, z, w, y, x) MSL_QUAD(T, 4, w, x, y, z) \
  MSL_QUAD(T, 4, w, x, z, y) MSL_QUAD(T, 4, w, y, x, z) MSL_QUAD(T, 4, w, y, z, x) MSL_QUAD(T, 4, w, z, x, y) \
  MSL_QUAD(T, 4, w, z, y, x) MSL_QUAD(T, 4, x, x, x, x) MSL_QUAD(T, 4, y, y, y, y) MSL_QUAD(T, 4, z, z, z, z) \
  MSL_QUAD(T, 4, w, w, w, w) MSL_QUAD(T, 4, x, y, x, y) MSL_QUAD(T, 4, z, w, z, w) MSL_QUAD(T, 4, x, x, y, y) \
  MSL_QUAD(T, 4, z, z, w, w)
