// swift-tools-version: 6.0
// What the app does but for its views, so that it can be compiled and tested without them.

import PackageDescription

let package = Package(
    name: "AppLogic",
    platforms: [.macOS(.v15), .iOS(.v18)],
    products: [.library(name: "AppLogic", targets: ["AppLogic"])],
    dependencies: [.package(name: "EdgeVLM", path: "../../swift")],
    targets: [
        .target(
            name: "AppLogic", dependencies: [.product(name: "EdgeVLM", package: "EdgeVLM")])
    ],
    swiftLanguageModes: [.v6]
)
