// swift-tools-version: 5.10

import PackageDescription

let package = Package(
    name: "bmojo-swift",
    platforms: [.macOS(.v14), .iOS(.v17)],
    products: [
        .library(name: "BMojo", targets: ["BMojo"]),
        .executable(name: "bmojo-chat", targets: ["bmojo-chat"]),
    ],
    dependencies: [
        .package(url: "https://github.com/ml-explore/mlx-swift", from: "0.31.6"),
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.3.3"),
    ],
    targets: [
        .target(
            name: "BMojo",
            dependencies: [
                .product(name: "MLX", package: "mlx-swift"),
                .product(name: "Tokenizers", package: "swift-transformers"),
            ]
        ),
        .executableTarget(name: "bmojo-chat", dependencies: ["BMojo"]),
    ]
)
