// Helpers of kernels that multiply rows of a weight by a vector.

// What a lane has summed for ROWS neighbouring rows.
template <int ROWS>
struct bmojo_row_sums {
    float of[ROWS];
};

// Adds columns begin ... end - 1 of rows first ... first + ROWS - 1 times x, whose element 0 is that of column `begin`.
// LANES lanes take PER neighbouring columns in turn. BITS 0: numbers as they are; else a word holds PER
// integers, the lowest first, and GROUP columns share a scale and an offset. Rows past the last repeat it.
template <int ROWS, int LANES, int BITS, int GROUP, typename X, typename W, typename S>
inline void bmojo_add_products(
    thread bmojo_row_sums<ROWS>& sums,
    X x, W weight, S scales, S offsets, int first, int rows, int columns, int begin, int end, int lane) {
    constexpr int PER = BITS == 0 ? 4 : 32 / (BITS == 0 ? 1 : BITS);
    constexpr uint MASK = (1u << BITS) - 1u;
    for (int at = begin + lane * PER; at < end; at += LANES * PER) {
        float in[PER];
        float total = 0.0f;
        for (int j = 0; j < PER; ++j) {
            in[j] = at + j < end ? float(x[at - begin + j]) : 0.0f;
            total += in[j];
        }
        for (int r = 0; r < ROWS; ++r) {
            const ulong row = ulong(metal::min(first + r, rows - 1));
            if (BITS == 0) {
                for (int j = 0; j < PER; ++j) {
                    sums.of[r] += at + j < end ? in[j] * float(weight[row * columns + at + j]) : 0.0f;
                }
            } else {
                const uint word = uint(weight[row * (columns / PER) + at / PER]);
                const ulong group = row * (columns / GROUP) + at / GROUP;
                float product = 0.0f;
                for (int j = 0; j < PER; ++j) {
                    product += in[j] * float(word >> (j * BITS) & MASK);
                }
                sums.of[r] += float(scales[group]) * product + float(offsets[group]) * total;
            }
        }
    }
}
