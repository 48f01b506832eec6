// Turns one pair of one head of x; `shared`: all rows of the batch have the same angles.
template <typename T, int P, typename Y, typename X, typename C, typename S>
inline void bmojo_rotate(Y turned, X x, C cos, S sin, bool shared, int heads, int head, int pair) {
    const int row = shared ? 0 : head / heads, first = head * P + pair, second = first + P / 2;
    const float a = float(x[first]), b = float(x[second]);
    const float c = cos[row * (P / 2) + pair], s = sin[(2 * row + 1) * (P / 2) + pair];
    turned[first] = T(a * c - b * s);
    turned[second] = T(b * c + a * s);
}
