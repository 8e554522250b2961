// Counters that all threads of a threadgroup add to.
typedef unsigned long ulong;
#define THREADGROUP_COUNTERS(name, size) __shared__ uint name[size]
FUNCTION void counter_set(uint* counter, uint x) { *counter = x; }
FUNCTION uint counter_get(uint* counter) { return *counter; }
FUNCTION uint counter_add(uint* counter, uint x) { return atomicAdd(counter, x); }
