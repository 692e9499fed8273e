// edge-ask BUNDLE PICTURE QUESTION [--max-tokens N] [--temperature T] [--no-check]
// The answer goes to standard output as it is made; a mistake is one line and exit code 2.

import EdgeVLM
import Foundation

let usage =
    "usage: edge-ask BUNDLE PICTURE QUESTION [--max-tokens N] [--temperature T] [--no-check]"

func fail(_ line: String) -> Never {
    FileHandle.standardError.write(Data("edge-ask: error: \(line)\n".utf8))
    exit(2)
}

var words: [String] = []
var options = AnswerOptions()
var checkFiles = true
var arguments = CommandLine.arguments.dropFirst()
while let argument = arguments.popFirst() {
    switch argument {
    case "--no-check":
        checkFiles = false
    case "--max-tokens":
        guard let value = arguments.popFirst().flatMap({ Int($0) }), value > 0 else {
            fail("--max-tokens takes a number above zero")
        }
        options.maxTokens = value
    case "--temperature":
        guard let value = arguments.popFirst().flatMap({ Float($0) }), value >= 0 else {
            fail("--temperature takes a number from zero on")
        }
        options.temperature = value
    case _ where argument.hasPrefix("--"):
        fail("\(argument) is not known; \(usage)")
    default:
        words.append(argument)
    }
}
guard words.count == 3 else {
    fail(usage)
}
do {
    let folder = URL(fileURLWithPath: words[0], isDirectory: true)
    let image = try Picture.load(URL(fileURLWithPath: words[1]))
    let generator = try await Generator(
        bundle: try ModelBundle(folder: folder, checkFiles: checkFiles))
    for try await piece in generator.answer(image: image, question: words[2], options: options) {
        FileHandle.standardOutput.write(Data(piece.utf8))
    }
    print()
} catch {
    fail(error.localizedDescription)
}
