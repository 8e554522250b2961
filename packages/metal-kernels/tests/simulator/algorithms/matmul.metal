constexpr int T = 8;
threadgroup float left[T][T], right[T][T];
int tx = thread_position_in_threadgroup.x, ty = thread_position_in_threadgroup.y;
int row = thread_position_in_grid.y, col = thread_position_in_grid.x;
int m = a_shape[0], depth = a_shape[1], n = b_shape[1];
float sum = 0;
for (int k = 0; k < depth; k += T) {
    left[ty][tx] = row < m && k + tx < depth ? a[row * depth + k + tx] : 0.0f;
    right[ty][tx] = k + ty < depth && col < n ? b[(k + ty) * n + col] : 0.0f;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int j = 0; j < T; ++j)
        sum = fma(left[ty][j], right[j][tx], sum);
    threadgroup_barrier(mem_flags::mem_none | mem_flags::mem_threadgroup);
}
if (row < m && col < n)
    out[row * n + col] = sum;
