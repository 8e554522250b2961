// Quantises rows into their slots in place. A SIMD-group per head: key heads, then value heads.
const int token = int(threadgroup_position_in_grid.x);
const int lane = int(thread_index_in_simdgroup);
const int either = int(threadgroup_position_in_grid.y) * SIMDGROUPS + int(simdgroup_index_in_threadgroup);
if (token == 0 && either == 0 && lane < 8) order_out[lane] = 0;
const int slot = slots_in[token];
if (slot >= 0 && either < 2 * KV_HEADS) {
  const bool is_value = either >= KV_HEADS;
  const int head = either % KV_HEADS;
  float x[8];
  UNROLL for (int i = 0; i < 8; ++i) {
    const int at = lane * 8 + i;
    if (at >= HEAD_SIZE) x[i] = 0.0f;
    else if (is_value) x[i] = to_f32(value_in[token * value_in_strides[0] + head * value_in_strides[1] + at * value_in_strides[2]]);
    else x[i] = to_f32(key_in[token * key_in_strides[0] + head * key_in_strides[1] + at * key_in_strides[2]]);
  }
  constexpr int KEY_DATA = HEAD_SIZE * Element<KEY_FORMAT>::BITS / 32;
  constexpr int VALUE_DATA = HEAD_SIZE * Element<VALUE_FORMAT>::BITS / 32;
  DEV(uint)* row = const_cast<DEV(uint)*>(kv_cache_in) + long(slot) * ROW_WORDS;
  DEV(uint)* scales = row + KV_HEADS * (KEY_DATA + VALUE_DATA);
  if (is_value) {
    store_head<VALUE_FORMAT, HEAD_SIZE>(
        x, lane, row + KV_HEADS * KEY_DATA + head * VALUE_DATA, scales + KV_HEADS * KEY_SCALES + head * VALUE_SCALES);
  } else {
    store_head<KEY_FORMAT, HEAD_SIZE>(x, lane, row + head * KEY_DATA, scales + head * KEY_SCALES);
  }
}
