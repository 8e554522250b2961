// Counters that all threads of a threadgroup add to.
#define THREADGROUP_COUNTERS(name, size) threadgroup atomic_uint name[size]
FUNCTION void counter_set(threadgroup atomic_uint* counter, uint x) { atomic_store_explicit(counter, x, memory_order_relaxed); }
FUNCTION uint counter_get(threadgroup atomic_uint* counter) { return atomic_load_explicit(counter, memory_order_relaxed); }
FUNCTION uint counter_add(threadgroup atomic_uint* counter, uint x) {
  return atomic_fetch_add_explicit(counter, x, memory_order_relaxed);
}
