threadgroup half keys[64];
const ushort lid = thread_position_in_threadgroup.x;
keys[lid] = half(x[lid]);
for (ushort size = 2; size <= 64; size <<= 1) {
    for (ushort stride = size / 2; stride > 0; stride >>= 1) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        ushort other = lid ^ stride;
        if (other > lid) {
            half low = min(keys[lid], keys[other]), high = max(keys[lid], keys[other]);
            bool up = (lid & size) == 0;
            keys[lid] = up ? low : high;
            keys[other] = up ? high : low;
        }
    }
}
threadgroup_barrier(mem_flags::mem_threadgroup);  // sorted
if (lid < 10) out[lid] = keys[63 - lid];
