// Soft targets and cross-entropy on the CPU. One task is some rows; a row is widened into buffers
// that the first two cache levels keep, each logit is read once, and so is each exp taken.
//
// Buffers are padded to 16 lanes with -inf, whose exp is 0, so that ten classes cost one pass of
// vector code and no scalar rest.
#include "logits.h"

#include <algorithm>
#include <memory>

#include "cpu/lanes.h"
#include "exp.h"
#include "logits_check.h"

namespace kdfast::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kTile = 1024;   // elements whose sums stay in A before they go on in double
constexpr int64_t kGrain = 4096;  // logits that are worth a thread
constexpr int64_t kOnStack = 1024;
constexpr int kBuffers = 6;

// Loops over the lanes stay loops ("unroll 1"): g++ 12 makes vectors of those, but not of sixteen
// unrolled statements.

template <typename A>
KD_HD A add_lanes(const A* lane) {
  A sum[8];
  for (int k = 0; k < 8; ++k) sum[k] = lane[k] + lane[k + 8];
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

// to = from, widened and padded with -inf. Returns the largest element; NaN counts as none.
template <typename A, typename T>
KD_CLONES A load_row(const T* __restrict__ from, int64_t count, int64_t padded,
                     A* __restrict__ to) {
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  A lane[kLanes];
  for (int k = 0; k < kLanes; ++k) lane[k] = kNone;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma GCC unroll 1
    for (int k = 0; k < kLanes; ++k) {
      const A x = A(widen(from[i + k]));
      to[i + k] = x;
      lane[k] = x > lane[k] ? x : lane[k];
    }
  }
  if (i < padded) {
    A last[kLanes];
    for (int k = 0; k < kLanes; ++k) last[k] = kNone;
    for (int k = 0; i + k < count; ++k) last[k] = A(widen(from[i + k]));
    for (int k = 0; k < kLanes; ++k) {
      to[i + k] = last[k];
      lane[k] = last[k] > lane[k] ? last[k] : lane[k];
    }
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lane[k] = lane[k + half] > lane[k] ? lane[k + half] : lane[k];
  }
  return lane[0];
}

// e = exp((z - largest) * inverse); returns its sum.
template <typename A>
KD_CLONES double exp_row(const A* __restrict__ z, int64_t padded, A largest, A inverse,
                         A* __restrict__ e) {
  double total = 0;
  for (int64_t start = 0; start < padded; start += kTile) {
    const int64_t end = start + kTile < padded ? start + kTile : padded;
    A lane[kLanes] = {};
    for (int64_t i = start; i < end; i += kLanes) {
#pragma GCC unroll 1
      for (int k = 0; k < kLanes; ++k) {
        const A x = exp_of((z[i + k] - largest) * inverse);
        e[i + k] = x;
        lane[k] += x;
      }
    }
    total += double(add_lanes(lane));
  }
  return total;
}

// hard = soft^P, which is exp(d) from exp(d / P); returns its sum.
template <typename A, int P>
KD_CLONES double power_row(const A* __restrict__ soft, int64_t padded, A* __restrict__ hard) {
  double total = 0;
  for (int64_t start = 0; start < padded; start += kTile) {
    const int64_t end = start + kTile < padded ? start + kTile : padded;
    A lane[kLanes] = {};
    for (int64_t i = start; i < end; i += kLanes) {
#pragma GCC unroll 1
      for (int k = 0; k < kLanes; ++k) {
        const A x = soft[i + k], square = x * x;
        const A y = P == 2 ? square : (P == 3 ? square * x : square * square * (P == 5 ? x : A(1)));
        hard[i + k] = y;
        lane[k] += y;
      }
    }
    total += double(add_lanes(lane));
  }
  return total;
}

struct TeacherSums {
  double sum;    // of e
  double cross;  // of e (d_t - d_s)
};

// e = exp((t - t_largest) * inverse). A class of probability 0 has no share in `cross`, whatever
// the student says.
template <typename A>
KD_CLONES TeacherSums teacher_row(const A* __restrict__ t, const A* __restrict__ s, int64_t padded,
                                  A t_largest, A s_largest, A inverse, A* __restrict__ e) {
  TeacherSums total{0, 0};
  for (int64_t start = 0; start < padded; start += kTile) {
    const int64_t end = start + kTile < padded ? start + kTile : padded;
    A sum[kLanes] = {}, cross[kLanes] = {};
    for (int64_t i = start; i < end; i += kLanes) {
#pragma GCC unroll 1
      for (int k = 0; k < kLanes; ++k) {
        const A d = t[i + k] - t_largest;
        const A x = exp_of(d * inverse);
        const A term = x * (d - (s[i + k] - s_largest));
        e[i + k] = x;
        sum[k] += x;
        cross[k] += choose(x == A(0), A(0), term);
      }
    }
    total.sum += double(add_lanes(sum));
    total.cross += double(add_lanes(cross));
  }
  return total;
}

// sum of `excess` over a row; e of the teacher and the student.
template <typename A>
KD_CLONES double excess_row(const A* __restrict__ e, const A* __restrict__ own,
                            const A* __restrict__ t, const A* __restrict__ s, int64_t padded,
                            A t_largest, A s_largest, A mean, A inverse, A level) {
  double total = 0;
  for (int64_t start = 0; start < padded; start += kTile) {
    const int64_t end = start + kTile < padded ? start + kTile : padded;
    A lane[kLanes] = {};
    for (int64_t i = start; i < end; i += kLanes) {
#pragma GCC unroll 1
      for (int k = 0; k < kLanes; ++k) {
        const A w = ((t[i + k] - t_largest) - (s[i + k] - s_largest) - mean) * inverse;
        lane[k] += excess(e[i + k], own[i + k], w, level);
      }
    }
    total += double(add_lanes(lane));
  }
  return total;
}

// to = weight * e, added to what is there unless it is the first.
template <typename A>
KD_CLONES void add_target(const A* __restrict__ e, int64_t padded, A weight, bool first,
                          A* __restrict__ to) {
  if (first) {
    for (int64_t i = 0; i < padded; ++i) to[i] = weight * e[i];
  } else {
    for (int64_t i = 0; i < padded; ++i) to[i] += weight * e[i];
  }
}

// out = slope.hard * hard + slope.soft * soft - weight * target - slope.base.
template <typename A, typename T>
KD_CLONES void student_slope_row(const A* hard, const A* soft, const A* target, int64_t count,
                                 StudentSlope<A> slope, A weight, T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    const A own = slope.hard * hard[i] + slope.soft * soft[i];
    out[i] = narrow_to<T>(own - (weight * target[i] + slope.base));
  }
}

// The same with labels given as probabilities.
template <typename A, typename T>
KD_CLONES void student_slope_row(const A* hard, const A* soft, const A* target, const A* labels,
                                 int64_t count, StudentSlope<A> slope, A weight,
                                 T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    const A own = slope.hard * hard[i] + slope.soft * soft[i];
    out[i] = narrow_to<T>(own - (weight * target[i] + (slope.base + slope.label * labels[i])));
  }
}

// out = weight * e * (d_t - d_s - mean); 0 where e is, though the student may have -inf there.
template <typename A, typename T>
KD_CLONES void teacher_slope_row(const A* __restrict__ e, const A* __restrict__ t,
                                 const A* __restrict__ s, int64_t count, A t_largest, A s_largest,
                                 A mean, A weight, T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    const A x = e[i];
    const A slope = weight * x * (((t[i] - t_largest) - (s[i] - s_largest)) - mean);
    out[i] = narrow_to<T>(choose(x == A(0), weight * x, slope));
  }
}

// Sums over labels given as probabilities; one of 0 has no share.
template <typename A>
LabelSums label_sums(const A* labels, const A* z, int64_t count, A largest) {
  double total = 0, along = 0;
  for (int64_t i = 0; i < count; ++i) {
    total += double(labels[i]);
    if (labels[i] != A(0)) along += double(labels[i]) * double(z[i] - largest);
  }
  return {total, along, 0};
}

template <typename A>
double sum_row(const A* z, int64_t count, A largest) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += double(z[i] - largest);
  return total;
}

// Buffers of one thread: on the stack for up to kOnStack classes.
template <typename A>
class Buffers {
 public:
  explicit Buffers(int64_t padded) {
    A* start = stack_;
    if (padded > kOnStack) {
      heap_.reset(new A[kBuffers * padded]);
      start = heap_.get();
    }
    for (int i = 0; i < kBuffers; ++i) buffer[i] = start + i * padded;
  }

  A* buffer[kBuffers];

 private:
  alignas(64) A stack_[kBuffers * kOnStack];
  std::unique_ptr<A[]> heap_;
};

// Losses and slopes of rows [begin, end).
template <typename A, typename T>
class Rows {
 public:
  explicit Rows(LogitsTask& task)
      : weights_(task.weights),
        rows_(task.rows),
        classes_(task.classes),
        padded_((task.classes + kLanes - 1) / kLanes * kLanes),
        student_(static_cast<const T*>(task.student.const_data_ptr())),
        teacher_(static_cast<const T*>(task.teacher.const_data_ptr())),
        indices_(task.indices()),
        probabilities_(task.probabilities<A>()),
        student_slope_(slope_of(task.student_slope)),
        teacher_slope_(slope_of(task.teacher_slope)),
        inverse_(A(1 / task.weights.temperature)),
        alpha_sum_(task.weights.sum()),
        divergence_(task.weights.any_divergence()) {}

  void run(int64_t begin, int64_t end, double* losses) const {
    const Buffers<A> buffers(padded_);
    for (int64_t row = begin; row < end; ++row) losses[row] = run(row, buffers.buffer);
  }

 private:
  static T* slope_of(Tensor& tensor) {
    return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.mutable_data_ptr());
  }

  double run(int64_t row, A* const* buffer) const {
    A *s = buffer[0], *soft = buffer[1], *hard = buffer[2], *t = buffer[3], *e = buffer[4];
    const A largest = load_row(student_ + row * classes_, classes_, padded_, s);
    double loss = 0, soft_sum = 1, hard_sum = 1, label_total = 0;
    if (divergence_) soft_sum = exp_row(s, padded_, largest, inverse_, soft);
    if (weights_.gamma != 0) {
      hard_sum = hard_row(s, soft, largest, soft_sum, &hard);
      const LabelSums sums = labels_of(row, s, largest);
      label_total = sums.total;
      loss = weights_.gamma *
             cross_entropy(sums, log_of(hard_sum), weights_.smoothing, classes_);
    } else {
      hard = soft;
    }
    if (!divergence_) soft = hard;

    const A* target = soft;
    A target_weight = 0;
    bool first = true;
    for (int64_t j = 0; j < weights_.members; ++j) {
      const int64_t offset = (j * rows_ + row) * classes_;
      if (weights_.alpha[j] == 0) {
        if (teacher_slope_) std::fill_n(teacher_slope_ + offset, classes_, narrow_to<T>(A(0)));
        continue;
      }
      const A top = load_row(teacher_ + offset, classes_, padded_, t);
      const TeacherSums sums = teacher_row(t, s, padded_, top, largest, inverse_, e);
      const double temperature = weights_.temperature;
      const double mean = sums.cross / sums.sum;
      double value = divergence(mean, log_of(sums.sum / soft_sum), temperature);
      if (needs_excess(value, classes_)) {
        const A level = A(exp_of(mean / temperature));
        value = std::log1p(excess_row(e, soft, t, s, padded_, top, largest, A(mean), inverse_,
                                      level) /
                           sums.sum);
      }
      loss += temperature * temperature * weights_.alpha[j] * value;
      const double weight = member_weight(weights_, j, sums.sum);
      if (teacher_slope_) {
        teacher_slope_row(e, t, s, classes_, top, largest, A(mean),
                          A(weight / temperature), teacher_slope_ + offset);
      }
      if (!student_slope_) continue;
      if (weights_.members == 1) {
        target = e;
        target_weight = A(weight);
      } else {
        add_target(e, padded_, A(weight), first, buffer[5]);
        target = buffer[5];
        target_weight = 1;
        first = false;
      }
    }
    if (student_slope_) {
      const StudentSlope<A> slope =
          student_slope<A>(weights_, divergence_ ? alpha_sum_ : 0, hard_sum, soft_sum, label_total,
                           classes_);
      T* out = student_slope_ + row * classes_;
      if (weights_.gamma != 0 && probabilities_) {
        student_slope_row(hard, soft, target, probabilities_ + row * classes_, classes_, slope,
                          target_weight, out);
      } else {
        student_slope_row(hard, soft, target, classes_, slope, target_weight, out);
        if (weights_.gamma != 0) {
          const int64_t label = indices_[row];
          const A own = slope.hard * hard[label] + slope.soft * soft[label];
          out[label] = narrow_to<T>(own - (target_weight * target[label] +
                                           (slope.base + slope.label)));
        }
      }
    }
    return loss;
  }

  // Points `hard` to exp(s - largest) and returns its sum. A small whole temperature makes it a
  // power of the softened one, at a tenth of the cost of another exp.
  double hard_row(const A* s, A* soft, A largest, double soft_sum, A** hard) const {
    const double temperature = divergence_ ? weights_.temperature : 0;
    if (temperature == 1) {
      *hard = soft;
      return soft_sum;
    }
    if (temperature == 2) return power_row<A, 2>(soft, padded_, *hard);
    if (temperature == 3) return power_row<A, 3>(soft, padded_, *hard);
    if (temperature == 4) return power_row<A, 4>(soft, padded_, *hard);
    if (temperature == 5) return power_row<A, 5>(soft, padded_, *hard);
    return exp_row(s, padded_, largest, A(1), *hard);
  }

  LabelSums labels_of(int64_t row, const A* s, A largest) const {
    LabelSums sums;
    if (probabilities_) {
      sums = label_sums(probabilities_ + row * classes_, s, classes_, largest);
    } else {
      sums = {1, double(s[indices_[row]] - largest), 0};
    }
    if (weights_.smoothing != 0) sums.all = sum_row(s, classes_, largest);
    return sums;
  }

  const LogitsWeights& weights_;
  const int64_t rows_, classes_, padded_;
  const T *student_, *teacher_;
  const int64_t* indices_;
  const A* probabilities_;
  T *student_slope_, *teacher_slope_;
  const A inverse_;
  const double alpha_sum_;
  const bool divergence_;
};

std::tuple<Tensor, Tensor, Tensor> distillation_loss(Tensor student_logits, Tensor teacher_logits,
                                                     std::optional<Tensor> labels,
                                                     std::vector<double> alpha, double gamma,
                                                     double temperature, double label_smoothing,
                                                     double unit, bool student_gradient,
                                                     bool teacher_gradient) {
  LogitsTask task("distillation_loss", student_logits, teacher_logits, labels, alpha, gamma,
                  temperature, label_smoothing, unit, student_gradient, teacher_gradient);
  if (const int64_t* indices = task.indices()) {
    for (int64_t row = 0; row < task.rows; ++row) {
      KD_CHECK(indices[row] >= 0 && indices[row] < task.classes, "distillation_loss: label ",
               indices[row], " of row ", row, " is not one of ", task.classes, " classes");
    }
  }
  Tensor loss = new_dense(task.student, {}, accumulate_type(task.student));
  const std::unique_ptr<double[]> losses(new double[task.rows]);
  with_accumulator(task.student, [&](auto zero) {
    using A = decltype(zero);
    with_storage<A>(task.storage, [&](auto element) {
      const Rows<A, decltype(element)> rows(task);
      const int64_t grain =
          std::max<int64_t>(1, kGrain / (task.classes * (task.weights.members + 1)));
      torch::stable::parallel_for(0, task.rows, grain, [&](int64_t begin, int64_t end) {
        rows.run(begin, end, losses.get());
      });
    });
    double total = 0;
    for (int64_t row = 0; row < task.rows; ++row) total += losses[row];
    *loss.mutable_data_ptr<A>() = A(total / double(task.rows));
  });
  return {loss, task.student_slope, task.teacher_slope};
}

template <typename A, typename T>
KD_CLONES void scale(const T* __restrict__ from, int64_t count, A factor, T* __restrict__ to) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow_to<T>(factor * A(widen(from[i])));
}

Tensor distillation_loss_backward(Tensor grad, Tensor slope, Tensor, double unit) {
  const Tensor dense = contiguous_rows(slope);
  Tensor gradient = torch::stable::empty_like(dense);
  with_accumulator(grad, [&](auto zero) {
    using A = decltype(zero);
    const A factor = A(double(*grad.const_data_ptr<A>()) * unit / double(slope.size(-2)));
    with_storage<A>(storage_of("distillation_loss_backward", slope), [&](auto element) {
      using T = decltype(element);
      const T* from = static_cast<const T*>(dense.const_data_ptr());
      T* to = static_cast<T*>(gradient.mutable_data_ptr());
      torch::stable::parallel_for(0, dense.numel(), 4 * kGrain, [&](int64_t begin, int64_t end) {
        scale<A, T>(from + begin, end - begin, factor, to + begin);
      });
    });
  });
  return gradient;
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("distillation_loss", TORCH_BOX(&kdfast::cpu::distillation_loss));
  m.impl("distillation_loss_backward", TORCH_BOX(&kdfast::cpu::distillation_loss_backward));
}
