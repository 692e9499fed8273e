// edge-ask BUNDLE PICTURE[,PICTURE...] QUESTION [QUESTION...] with the options below: one
// conversation. Answers go to standard output as they are made, the times of their stages to
// standard error; a mistake is one line and exit code 2.

import EdgeVLM
import Foundation

let usage = """
    usage: edge-ask BUNDLE PICTURE[,PICTURE...] QUESTION [QUESTION...]
      --max-tokens N  --temperature T  --top-k K  --top-p P  --seed S  --stop TEXT  --system TEXT
      --context N     one of the bundle's contexts, in the place of its first
      --size N        of the bundle's sizes of pictures the one so many pixels wide
      --no-check      do not compare the bundle's files with their hashes
      --no-trial      do not run every package once before the first question
      --json          a JSON object for each answer, with its text and report
      --check-pictures  compare this device's pictures with the bundle's test vectors, and end
    a + before a question begins a new conversation; --- in the place of pictures is none
    """

struct Arguments {
    var words: [String] = []
    var options = AnswerOptions()
    var session = Session.Options()
    var check = ModelBundle.FileCheck.once
    var json = false
    var checksPictures = false
    var width: Int?

    init(_ given: [String]) throws {
        var rest = given[...]
        while let word = rest.popFirst() {
            func value() throws -> String {
                guard let next = rest.popFirst() else {
                    throw EdgeVLMError("\(word) has no value", usage)
                }
                return next
            }
            func number<N: LosslessStringConvertible>() throws -> N {
                let text = try value()
                guard let number = N(text) else {
                    throw EdgeVLMError("\(word) does not take \(text)", usage)
                }
                return number
            }
            switch word {
            case "--max-tokens": options.maxTokens = try number()
            case "--temperature": options.temperature = try number()
            case "--top-k": options.topK = try number()
            case "--top-p": options.topP = try number()
            case "--seed": options.seed = try number() as UInt64
            case "--stop": options.stop.append(try value())
            case "--system": session.system = try value()
            case "--context": session.context = try number() as Int
            case "--size": width = try number() as Int
            case "--no-check": check = .never
            case "--no-trial": session.tries = false
            case "--json": json = true
            case "--check-pictures": checksPictures = true
            case _ where word.hasPrefix("--") && word != "---":
                throw EdgeVLMError("\(word) is not known", usage)
            default: words.append(word)
            }
        }
        guard words.count >= (checksPictures ? 1 : 3) else {
            throw EdgeVLMError("there is too little to do", usage)
        }
    }
}

struct Said: Encodable {
    let text: String
    let report: AnswerReport
}

func write(_ text: String, to handle: FileHandle = .standardOutput) {
    handle.write(Data(text.utf8))
}

func answer(
    _ session: Session, _ question: String, _ pictures: [Picture], _ arguments: Arguments
) async throws {
    var text = ""
    for try await event in session.ask(question, pictures: pictures, options: arguments.options) {
        switch event {
        case .text(let piece):
            text += piece
            if !arguments.json { write(piece) }
        case .stage: break
        case .dropped(let turns):
            write("edge-ask: the context is full: \(turns) turns dropped\n", to: .standardError)
        case .done(let report):
            if arguments.json {
                let line = try JSONEncoder().encode(Said(text: text, report: report))
                write(String(decoding: line, as: UTF8.self) + "\n")
            } else {
                let times = report.stages.map {
                    "\($0.stage.rawValue) \(Int($0.seconds * 1000)) ms"
                }
                write("\n")
                write("edge-ask: \(times.joined(separator: ", "))\n", to: .standardError)
            }
        }
    }
}

func run() async throws {
    let arguments = try Arguments(Array(CommandLine.arguments.dropFirst()))
    let folder = URL(fileURLWithPath: arguments.words[0], isDirectory: true)
    let bundle = try ModelBundle(folder: folder, check: arguments.check)
    if arguments.checksPictures {
        for (name, worst) in try PreprocessingCheck(bundle).differences.sorted(by: <) {
            write("\(name): \(worst)\n")
        }
        return
    }
    let names = arguments.words[1] == "---" ? [] : arguments.words[1].split(separator: ",")
    var pictures = try names.map { try Picture(contentsOf: URL(fileURLWithPath: String($0))) }
    let given = pictures
    var options = arguments.session
    if let width = arguments.width {
        options.size = bundle.manifest.sizes?.first { $0.width == width }
        guard options.size != nil else {
            let known = bundle.manifest.sizes?.map { String($0.width) } ?? []
            throw EdgeVLMError(
                "the bundle takes no pictures \(width) pixels wide",
                "choose one of its widths: \(known.joined(separator: ", "))")
        }
    }
    let session = try await Session(bundle: bundle, options: options)
    for question in arguments.words.dropFirst(2) {
        if question.hasPrefix("+") {
            await session.reset()
            pictures = given
        }
        let words = String(question.drop { $0 == "+" })
        try await answer(session, words, pictures, arguments)
        pictures = []
    }
}

do {
    try await run()
} catch {
    write("edge-ask: error: \(error.localizedDescription)\n", to: .standardError)
    exit(2)
}
