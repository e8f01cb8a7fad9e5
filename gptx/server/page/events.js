/** Server-sent events of a response to a POST, which `EventSource` cannot make. */

/**
 * Yield the object of each `data:` event until `[DONE]`.
 *
 * @param {ReadableStream<Uint8Array>} body
 */
export async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (pending + value).split("\n");
      pending = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // the end of an event, or a comment
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    await reader.cancel().catch(() => {}); // closes the connection: the server stops
  }
}
