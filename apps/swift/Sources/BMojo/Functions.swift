// The functions of an .mlxfn file, called with as many arrays as they take.
//
// mlx-swift's own `ImportedFunction` is @dynamicCallable: its arguments are written out in the source. A state is a list,
// so this calls the C functions underneath; MLXArray's `ctx` and `init(_:)` are public for that.

import Cmlx
import Foundation
import MLX

final class Functions {
    private let imported: mlx_imported_function

    /// Opens a file that was made with `version` of MLX. The format has no version of its own: another minor version
    /// misreads it, so it is not tried.
    init(_ url: URL, madeWith version: String) throws {
        let here = Functions.version
        guard here.split(separator: ".").prefix(2) == version.split(separator: ".").prefix(2) else {
            throw BMojoError("\(url.path): was made with MLX \(version), this program has \(here); see the README")
        }
        guard FileManager.default.fileExists(atPath: url.path) else {
            throw BMojoError("\(url.path): file is missing")
        }
        imported = try withError { mlx_imported_function_new(url.path) }
    }

    deinit { mlx_imported_function_free(imported) }

    func callAsFunction(_ arrays: [MLXArray]) throws -> [MLXArray] {
        var results = mlx_vector_array_new()
        defer { mlx_vector_array_free(results) }
        let given = mlx_vector_array_new()
        defer { mlx_vector_array_free(given) }
        for array in arrays {
            mlx_vector_array_append_value(given, array.ctx)
        }
        _ = try withError { mlx_imported_function_apply(&results, imported, given) }
        return (0 ..< mlx_vector_array_size(results)).map { index in
            var array = mlx_array_new()
            mlx_vector_array_get(&array, results, index)
            return MLXArray(array)
        }
    }

    private static var version: String {
        var text = mlx_string_new()
        defer { mlx_string_free(text) }
        mlx_version(&text)
        return String(cString: mlx_string_data(text))
    }
}
