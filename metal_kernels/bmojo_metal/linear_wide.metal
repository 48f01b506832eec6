    // W x + bias for one vector a row of the batch, summed in float32: unrounded, and rounded to x's dtype.
    // A SIMD-group takes ROWS rows of W, so that what it reads of x serves them all.
    constexpr int ROWS = 4, GROUPS = 4;
    const int lane = int(thread_index_in_simdgroup), row = int(threadgroup_position_in_grid.y);
    const int group = int(threadgroup_position_in_grid.x) * GROUPS + int(simdgroup_index_in_threadgroup);
    const int first = group * ROWS, rows = int(weight_shape[0]), columns = int(x_shape[1]);
    bmojo_row_sums<ROWS> sums;
    for (int r = 0; r < ROWS; ++r) {
        sums.of[r] = 0.0f;
    }
    bmojo_add_products<ROWS, 32, BITS, GROUP>(
        sums, x + ulong(row) * columns, weight, scales, offsets, first, rows, columns, 0, columns, lane);
    for (int r = 0; r < ROWS; ++r) {
        const float sum = bmojo_sum<32>(sums.of[r]);
        if (lane == 0 && first + r < rows) {
            const float out = HAS_BIAS ? sum + float(bias[first + r]) : sum;
            wide[ulong(row) * rows + first + r] = out;
            rounded[ulong(row) * rows + first + r] = T(out);
        }
    }
