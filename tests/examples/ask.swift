// FOLDER BUNDLE QUESTION MAX-TOKENS: the example's answer about FOLDER/picture, for the test.

let given = CommandLine.arguments
do {
    let rgb = [UInt8](try Data(contentsOf: URL(fileURLWithPath: given[1] + "/picture")))
    let image = CGImage(side: Int(Double(rgb.count / 3).squareRoot()), rgb: rgb)
    let bundle = try ModelBundle(folder: URL(fileURLWithPath: given[2], isDirectory: true))
    let generator = try await Generator(bundle: bundle)
    let options = AnswerOptions(maxTokens: Int(given[4])!)
    for try await piece in generator.answer(image: image, question: given[3], options: options) {
        print(piece, terminator: "")
    }
} catch {
    print("error: \(error.localizedDescription)", terminator: "")
}
