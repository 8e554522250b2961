threadgroup half left[16 * 16], right[16 * 16];
uint lid = thread_index_in_threadgroup, sg = simdgroup_index_in_threadgroup;
for (uint k = lid; k < 256; k += 128) left[k] = half(a[k]), right[k] = half(b[k]);
threadgroup_barrier(mem_flags::mem_threadgroup);
uint row = sg / 2 * 8, col = sg % 2 * 8;
simdgroup_matrix<float, 8, 8> sum(0);
for (uint k = 0; k < 16; k += 8) {
    simdgroup_half8x8 p, q;
    simdgroup_load(p, left + row * 16 + k, 16);
    simdgroup_load(q, right, 16, ulong2(col, k));
    simdgroup_multiply_accumulate(sum, p, q, sum);
}
simdgroup_store(sum, out + row * 16 + col, 16);
