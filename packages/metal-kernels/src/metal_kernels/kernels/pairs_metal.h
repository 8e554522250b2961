#define FP8_UNIT 256
