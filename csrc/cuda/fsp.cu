// Glue of the Gram matrix kernels: checks, outputs, launch tables.
#include "cuda/fsp.cuh"

#include "cuda/launch.cuh"
#include "fsp_check.h"

namespace kdfast::cuda {
namespace {

void check_limits(const char* op, const std::vector<GramPair>& pairs) {
  KD_CHECK(int64_t(pairs.size()) <= kGramPairs, op, ": expected at most ", kGramPairs, " pairs");
  for (const GramPair& pair : pairs) {
    KD_CHECK(pair.channels(0) <= kGramChannels && pair.channels(1) <= kGramChannels, op,
             ": expected at most ", kGramChannels, " channels");
  }
}

template <typename A>
void launch_gradients(const std::vector<DenseFeature>& features,
                      const std::vector<GramPair>& pairs, const std::vector<Tensor>& matrices,
                      const std::vector<double>& factors, bool maximum,
                      const std::vector<int64_t>& wanted, std::vector<Tensor>& gradients,
                      const A* upstream, cudaStream_t stream) {
  GramGradientTable<A> table{};
  table.count = int(wanted.size());
  table.maximum = maximum;
  int64_t blocks = 0;
  int parts = 0;
  for (int i = 0; i < table.count; ++i) {
    const DenseFeature& feature = features[wanted[i]];
    GramGradientTask& task = table.task[i];
    task = {feature.view, feature.tensor.size(3), gradients[i].mutable_data_ptr(), blocks, parts,
            0};
    const int64_t tile = gram_tile(feature.view.channels);
    blocks += feature.view.samples * ((feature.view.positions + tile - 1) / tile);
    for (size_t p = 0; p < pairs.size(); ++p) {
      for (int side : {1, 0}) {
        const GramPair& pair = pairs[p];
        if ((side == 0 ? pair.first : pair.second) != wanted[i]) continue;
        const Grid& own = pair.grid[side];
        KD_CHECK(parts < kGramParts, "fsp: expected every place once");
        const double window = maximum ? 1 : double(own.window());
        table.part[parts++] = {pair.grid[1 - side],
                               own.width,
                               own.rows,
                               own.columns,
                               matrices[p].const_data_ptr<A>(),
                               A(factors[p] / (double(own.positions) * window)),
                               side};
        ++task.parts;
      }
    }
  }
  launch(gram_gradients<A>, blocks, kGramThreads, kGramGradientShared * sizeof(A), stream, table,
         upstream);
}

Tensor fsp_matrix(Tensor first, Tensor second, bool maximum) {
  const CurrentDevice device(first);
  const DenseFeature a("fsp_matrix", first), b("fsp_matrix", second);
  const GramPair pair = gram_pair("fsp_matrix", a, b);
  check_limits("fsp_matrix", {pair});
  Tensor matrix = empty_on(first, {a.view.samples, pair.channels(0), pair.channels(1)},
                           accumulate_type(first));
  with_accumulator(first, [&](auto zero) {
    using A = decltype(zero);
    GramTable<A> table{};
    table.count = 1;
    table.networks = 1;
    table.maximum = maximum;
    table.task[0] = {{{pair.grid[0], pair.grid[1]}, {}}, matrix.mutable_data_ptr<A>(), 0};
    launch(gram_matrices<A>, a.view.samples, kGramThreads, kGramShared * sizeof(A), device.stream,
           table, static_cast<A*>(nullptr));
  });
  return matrix;
}

std::vector<Tensor> fsp_matrix_backward(Tensor grad, Tensor first, Tensor second, bool maximum,
                                        std::vector<int64_t> wanted) {
  const char* op = "fsp_matrix_backward";
  const CurrentDevice device(grad);
  const std::vector<DenseFeature> features = dense_features(op, {first, second});
  const std::vector<GramPair> pairs = gram_pairs(op, features, {0, 1});
  const Tensor dense_grad = torch::stable::contiguous(grad);
  check_limits(op, pairs);
  check_matrix(op, dense_grad, pairs[0]);
  check_wanted(op, wanted, features);
  std::vector<Tensor> gradients;
  for (int64_t place : wanted) gradients.push_back(empty_gradient(features[place]));
  if (wanted.empty()) return gradients;
  with_accumulator(grad, [&](auto zero) {
    using A = decltype(zero);
    launch_gradients<A>(features, pairs, {dense_grad}, {1.0}, maximum, wanted, gradients, nullptr,
                        device.stream);
  });
  return gradients;
}

std::tuple<Tensor, std::vector<Tensor>> fsp_loss(std::vector<Tensor> student,
                                                 std::vector<Tensor> teacher,
                                                 std::vector<int64_t> places, bool maximum) {
  const std::vector<DenseFeature> students = dense_features("fsp_loss", student);
  const std::vector<DenseFeature> teachers = dense_features("fsp_loss", teacher);
  const std::vector<GramPair> pairs = gram_pairs("fsp_loss", students, places);
  const std::vector<GramPair> others = gram_pairs("fsp_loss", teachers, places);
  check_networks("fsp_loss", pairs, others);
  check_limits("fsp_loss", pairs);
  const CurrentDevice device(student[0]);
  const int64_t samples = students[0].view.samples;

  const ScalarType type = accumulate_type(student[0]);
  Tensor loss = empty_on(student[0], {}, type);
  Tensor squares = empty_on(student[0], {int64_t(pairs.size()), samples}, type);
  std::vector<Tensor> differences;
  with_accumulator(student[0], [&](auto zero) {
    using A = decltype(zero);
    GramTable<A> table{};
    table.count = int(pairs.size());
    table.networks = 2;
    table.maximum = maximum;
    for (int p = 0; p < table.count; ++p) {
      const GramPair &s = pairs[p], &t = others[p];
      differences.push_back(empty_on(student[0], {samples, s.channels(0), s.channels(1)}, type));
      table.task[p] = {{{s.grid[0], s.grid[1]}, {t.grid[0], t.grid[1]}},
                       differences[p].mutable_data_ptr<A>(),
                       p * samples};
    }
    A* sums = squares.mutable_data_ptr<A>();
    launch(gram_matrices<A>, table.count * samples, kGramThreads, kGramShared * sizeof(A),
           device.stream, table, sums);
    launch(gram_loss_sum<A>, 1, kGramSumThreads, 0, device.stream, table, sums,
           loss.mutable_data_ptr<A>());
  });
  return {loss, differences};
}

std::vector<Tensor> fsp_loss_backward(Tensor grad, std::vector<Tensor> features,
                                      std::vector<Tensor> differences, std::vector<int64_t> places,
                                      bool maximum, std::vector<int64_t> wanted, double sign) {
  const char* op = "fsp_loss_backward";
  const CurrentDevice device(grad);
  const std::vector<DenseFeature> dense = dense_features(op, features);
  const std::vector<GramPair> pairs = gram_pairs(op, dense, places);
  check_limits(op, pairs);
  check_wanted(op, wanted, dense);
  KD_CHECK(dense.size() <= size_t(kGramParts), op, ": expected at most ", kGramParts, " features");
  KD_CHECK(differences.size() == pairs.size(), op, ": expected a difference for every pair");
  std::vector<double> factors;
  for (size_t p = 0; p < pairs.size(); ++p) {
    check_matrix(op, differences[p], pairs[p]);
    factors.push_back(2 * sign / double(differences[p].numel()));
  }
  std::vector<Tensor> gradients;
  for (int64_t place : wanted) gradients.push_back(empty_gradient(dense[place]));
  if (wanted.empty()) return gradients;
  with_accumulator(grad, [&](auto zero) {
    using A = decltype(zero);
    launch_gradients<A>(dense, pairs, differences, factors, maximum, wanted, gradients,
                        grad.const_data_ptr<A>(), device.stream);
  });
  return gradients;
}

}  // namespace

KD_CUDA_LIBRARY(m) {
  m.impl("fsp_matrix", TORCH_BOX(&fsp_matrix));
  m.impl("fsp_matrix_backward", TORCH_BOX(&fsp_matrix_backward));
  m.impl("fsp_loss", TORCH_BOX(&fsp_loss));
  m.impl("fsp_loss_backward", TORCH_BOX(&fsp_loss_backward));
}

}  // namespace kdfast::cuda
