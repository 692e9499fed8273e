// swift-tools-version: 6.0
// The library EdgeVLM, which an app takes in, and edge-ask, a command line around it.
// A bundle comes from `mlx-vlm-edge export MODEL -o DIR`.

import PackageDescription

let package = Package(
    name: "EdgeVLM",
    platforms: [.macOS(.v15), .iOS(.v18)],
    products: [
        .library(name: "EdgeVLM", targets: ["EdgeVLM"]),
        .executable(name: "edge-ask", targets: ["edge-ask"]),
    ],
    targets: [
        .target(name: "EdgeVLM"),
        .executableTarget(name: "edge-ask", dependencies: ["EdgeVLM"]),
    ],
    swiftLanguageModes: [.v6]
)
