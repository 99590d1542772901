// Where schemas are defined: one file a family of ops, all in one namespace.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef KD_NAMESPACE
#define KD_NAMESPACE kdfast
#endif

// One more level, so that the namespace is expanded before it is pasted.
#define KD_FRAGMENT(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)

// KD_SCHEMAS(m) { m.def("..."); } defines schemas of torch.ops.kdfast.*.
#define KD_SCHEMAS(m) KD_FRAGMENT(KD_NAMESPACE, m)
