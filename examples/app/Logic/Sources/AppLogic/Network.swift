// HTTP by URLSession, with a range where a file goes on; a refusal is one line.

import EdgeVLM
import Foundation

#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

public final class URLSessionTransport: NSObject, Transport, URLSessionDataDelegate {
    private let tasks = Tasks()

    /// What the delegate's calls come to, by task.
    private final class Tasks: @unchecked Sendable {
        private let lock = NSLock()
        private var waiting: [Int: Waiting] = [:]

        func set(_ id: Int, _ value: Waiting?) { lock.withLock { waiting[id] = value } }
        func get(_ id: Int) -> Waiting? { lock.withLock { waiting[id] } }
    }

    private struct Waiting: Sendable {
        let bytes: AsyncThrowingStream<Data, Error>.Continuation
        let began: AsyncThrowingStream<HTTPURLResponse, Error>.Continuation
    }

    public func get(_ url: URL, from offset: Int) async throws -> Incoming {
        var request = URLRequest(url: url)
        if offset > 0 { request.setValue("bytes=\(offset)-", forHTTPHeaderField: "Range") }
        let (bytes, put) = AsyncThrowingStream<Data, Error>.makeStream()
        let (began, begin) = AsyncThrowingStream<HTTPURLResponse, Error>.makeStream()
        let session = URLSession(configuration: .default, delegate: self, delegateQueue: nil)
        let task = session.dataTask(with: request)
        tasks.set(ObjectIdentifier(task).hashValue, Waiting(bytes: put, began: begin))
        put.onTermination = { _ in task.cancel() }
        task.resume()
        session.finishTasksAndInvalidate()
        for try await response in began {
            switch response.statusCode {
            case 206: return Incoming(start: offset, bytes: bytes)
            case 200: return Incoming(start: 0, bytes: bytes)
            case 416:  // all of it is there
                put.finish()
                return Incoming(start: offset, bytes: bytes)
            default:
                throw EdgeVLMError(
                    "\(url.lastPathComponent): the server answers \(response.statusCode)",
                    "check the address")
            }
        }
        throw EdgeVLMError("\(url): no answer", "check the connection")
    }

    public func urlSession(
        _ session: URLSession, dataTask: URLSessionDataTask, didReceive response: URLResponse,
        completionHandler: @escaping @Sendable (URLSession.ResponseDisposition) -> Void
    ) {
        if let response = response as? HTTPURLResponse {
            tasks.get(ObjectIdentifier(dataTask).hashValue)?.began.yield(response)
        }
        completionHandler(.allow)
    }

    public func urlSession(
        _ session: URLSession, dataTask: URLSessionDataTask, didReceive data: Data
    ) {
        tasks.get(ObjectIdentifier(dataTask).hashValue)?.bytes.yield(data)
    }

    public func urlSession(
        _ session: URLSession, task: URLSessionTask, didCompleteWithError error: (any Error)?
    ) {
        let id = ObjectIdentifier(task).hashValue
        let waiting = tasks.get(id)
        tasks.set(id, nil)
        waiting?.began.finish(throwing: error)
        waiting?.bytes.finish(throwing: error)
    }
}
