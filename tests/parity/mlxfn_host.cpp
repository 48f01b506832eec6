// A host of an mlxfn export in C++: everything it knows of the model is in the manifest (docs/export.md).
//
//     mlxfn_host MODEL.mlxfn CHUNK COMMITS STATE OUT TOKEN...
//
// STATE has a line `dtype fill dimension...` for each array of the manifest's `state`, COMMITS is 1 where the manifest has
// `commit`. Writes the logits of the last token of every call to OUT (.safetensors) as row_0, row_1, ...
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#include "mlx/mlx.h"

namespace mx = mlx::core;

static mx::Dtype dtype_of(const std::string& name) {
  static const std::unordered_map<std::string, mx::Dtype> known = {
      {"float32", mx::float32}, {"float16", mx::float16}, {"bfloat16", mx::bfloat16}, {"int64", mx::int64}};
  return known.at(name);
}

static std::vector<mx::array> fresh_state(const std::string& path) {
  std::ifstream lines(path);
  std::vector<mx::array> state;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string dtype;
    int fill;
    mx::Shape shape;
    words >> dtype >> fill;
    for (int n; words >> n;) {
      shape.push_back(n);
    }
    state.push_back(mx::full(shape, mx::array(fill), dtype_of(dtype)));
  }
  return state;
}

int main(int count, char** words) {
  auto model = mx::import_function(words[1]);
  const int chunk = std::atoi(words[2]);
  const bool commits = std::atoi(words[3]) != 0;
  auto state = fresh_state(words[4]);
  const std::vector<int> tokens = [&] {
    std::vector<int> found;
    for (int i = 6; i < count; i++) {
      found.push_back(std::atoi(words[i]));
    }
    return found;
  }();
  std::unordered_map<std::string, mx::array> rows;
  for (size_t position = 0; position < tokens.size();) {
    const bool aligned = position % chunk == 0;
    // Every other chunk whole, the others token by token: both ways, on one state.
    const bool whole = aligned && chunk > 1 && position / chunk % 2 == 0 && position + chunk <= tokens.size();
    const int size = whole ? chunk : 1;
    if (aligned && !whole && commits) {
      state = model(state);
    }
    std::vector<mx::array> given = {mx::array(tokens.data() + position, {1, size}, mx::int32)};
    given.insert(given.end(), state.begin(), state.end());
    auto found = model(given);
    mx::eval(found);
    rows.insert({"row_" + std::to_string(rows.size()), found[0]});
    state.assign(found.begin() + 1, found.end());
    position += size;
  }
  mx::save_safetensors(words[5], rows);
  return 0;
}
