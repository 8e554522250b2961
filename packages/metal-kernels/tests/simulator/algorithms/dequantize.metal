uint i = thread_position_in_grid.x;
if (i >= uint(w_shape[0])) return;
uint word = w[i];
half2 affine = half2(half(scales[i / 4]), half(biases[i / 4]));
float4 low, high;
for (uint k = 0; k < 4; k++) {
    low[k] = float(fma(half(word >> (4 * k) & 0xF), affine.x, affine.y));
    high[k] = float(fma(half(word >> (16 + 4 * k) & 0xF), affine.x, affine.y));
}
device float4* to = (device float4*)(out + i * 8);
to[0] = low;
to[1] = high;
