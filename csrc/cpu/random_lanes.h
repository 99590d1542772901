// The loops of cpu/random.h at one vector width. cpu/random.cpp includes this once a width, within
// a namespace that defines Wide (64-bit lanes) and product(Wide, Wide) (of their lower halves) and
// under the target it is compiled for. The compiler's own code for 32 x 32 -> 64 bit products
// shuffles so much that it takes three times as long.

struct State {
  Wide a, b, c, d;
};

inline void philox_round(State& s, Wide low, Wide high) {
  const Wide zero = {};
  const Wide p = product(s.a, zero + uint64_t(0xD2511F53u));
  const Wide q = product(s.c, zero + uint64_t(0xCD9E8D57u));
  s = {(q >> 32) ^ (s.b ^ low), q, (p >> 32) ^ (s.d ^ high), p};
}

inline void store_words(const State& even, const State& odd, uint32_t (&word)[4][kLanes],
                        int start) {
  const Wide lower = Wide{} + uint64_t(0xffffffffu);
  const Wide result[4] = {
      (even.a & lower) | (odd.a << 32), (even.b & lower) | (odd.b << 32),
      (even.c & lower) | (odd.c << 32), (even.d & lower) | (odd.d << 32)};
  for (int k = 0; k < 4; ++k) std::memcpy(word[k] + start, &result[k], sizeof(Wide));
}

// word[k][i] = word k of the counter with block first + i.
inline void philox_lanes(uint64_t key, uint64_t id, uint32_t sample, uint32_t first,
                         uint32_t (&word)[4][kLanes]) {
  constexpr int kWide = sizeof(Wide) / sizeof(uint64_t);
  const Wide zero = {};
  Wide even;
  for (int i = 0; i < kWide; ++i) even[i] = uint64_t(2 * i);
  const State counter = {zero, zero + uint64_t(uint32_t(id)), zero + uint64_t(id >> 32),
                         zero + uint64_t(sample)};
  for (int start = 0; start < kLanes; start += 4 * kWide) {
    // Even counters in one vector and odd ones in the next, and more of them than one chain of
    // dependent products leaves the processor to do. Upper halves of lanes are garbage.
    State s = counter, t = counter, u = counter, v = counter;
    s.a = even + uint64_t(first + uint32_t(start));
    t.a = even + uint64_t(first + uint32_t(start + 1));
    u.a = even + uint64_t(first + uint32_t(start + 2 * kWide));
    v.a = even + uint64_t(first + uint32_t(start + 2 * kWide + 1));
    uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Wide low_key = zero + uint64_t(low), high_key = zero + uint64_t(high);
      philox_round(s, low_key, high_key);
      philox_round(t, low_key, high_key);
      philox_round(u, low_key, high_key);
      philox_round(v, low_key, high_key);
      low += 0x9E3779B9u;
      high += 0xBB67AE85u;
    }
    store_words(s, t, word, start);
    store_words(u, v, word, start + 2 * kWide);
  }
}

inline void normal_lanes(const uint32_t (&word)[4][kLanes], float* __restrict__ out) {
  for (int i = 0; i < kLanes; ++i) {
    const Normal4 normals = normals_of({{word[0][i], word[1][i], word[2][i], word[3][i]}});
    for (int k = 0; k < 4; ++k) out[4 * i + k] = normals.value[k];
  }
}

inline void bit_lanes(const uint32_t (&word)[4][kLanes], uint32_t* __restrict__ out) {
  for (int i = 0; i < kLanes; ++i) {
    for (int k = 0; k < 4; ++k) out[4 * i + k] = word[k][i];
  }
}

void normals(uint64_t key, uint64_t id, uint32_t sample, uint32_t first, int64_t count,
             float* out) {
  alignas(64) uint32_t word[4][kLanes];
  alignas(64) float last[kCounterBlock];
  for (; count > 0; count -= kCounterBlock, out += kCounterBlock, first += kLanes) {
    philox_lanes(key, id, sample, first, word);
    if (count >= kCounterBlock) {
      normal_lanes(word, out);
    } else {
      normal_lanes(word, last);
      std::memcpy(out, last, count * sizeof(float));
    }
  }
}

void words(uint64_t key, uint64_t id, uint32_t sample, uint32_t first, int64_t count,
           uint32_t* out) {
  alignas(64) uint32_t word[4][kLanes];
  alignas(64) uint32_t last[kCounterBlock];
  for (; count > 0; count -= kCounterBlock, out += kCounterBlock, first += kLanes) {
    philox_lanes(key, id, sample, first, word);
    if (count >= kCounterBlock) {
      bit_lanes(word, out);
    } else {
      bit_lanes(word, last);
      std::memcpy(out, last, count * sizeof(uint32_t));
    }
  }
}
