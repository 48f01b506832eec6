// Talking to the server: JSON, streams, and the API key, which is asked for when the server first refuses.
// This module knows no page.

const KEY = "bmojo-edge.key";

/** The server's refusal. `status` is HTTP's, null in the middle of a stream; `code` names the reason, or is null. */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Nothing answers, or the answer broke off. */
export class Unreachable extends Error {
  name = "Unreachable";
}

export class Api {
  #askKey;
  #key = sessionStorage.getItem(KEY);
  #asking = null;

  /** `askKey(again)` resolves to a key, or to null where the user gives none; `again`: the one before was refused. */
  constructor(askKey) {
    this.#askKey = askKey;
  }

  /** The object that the server answers with; null where it answers with nothing. Raises ApiError and Unreachable. */
  async call(method, path, body = undefined, signal = undefined) {
    const response = await this.#fetch(method, path, body, signal);
    if (!response.ok) throw await refusal(response);
    if (response.status === 204) return null;
    try {
      return await response.json();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Unreachable("The answer of the server broke off.");
    }
  }

  /** The chunks of a streamed answer. Raises ApiError, Unreachable, and AbortError through `signal`. */
  async *stream(path, body, signal) {
    const response = await this.#fetch("POST", path, { ...body, stream: true }, signal);
    if (!response.ok) throw await refusal(response);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    try {
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        buffer += value;
        const events = buffer.split("\n\n");
        buffer = events.pop();
        for (const event of events) {
          const data = event.replace(/^data: /, "");
          if (data === "[DONE]") return;
          const chunk = JSON.parse(data);
          if (chunk.error) throw new ApiError(null, chunk.error.message, chunk.error.code);
          yield chunk;
        }
      }
    } catch (error) {
      if (error instanceof ApiError || error.name === "AbortError") throw error;
      throw new Unreachable("The connection to the server broke off.");
    } finally {
      reader.cancel().catch(() => {});
    }
    throw new Unreachable("The server ended before the answer was complete.");
  }

  async #fetch(method, path, body, signal) {
    for (;;) {
      const key = this.#key;
      const headers = key === null ? {} : { authorization: `Bearer ${key}` };
      if (body !== undefined) headers["content-type"] = "application/json";
      let response;
      try {
        response = await fetch(path, {
          method,
          headers,
          body: body && JSON.stringify(body),
          signal,
          cache: "no-store",
        });
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Unreachable("The server cannot be reached.");
      }
      if (response.status !== 401) return response;
      if (this.#key === key) await this.#renewKey(key !== null); // else another request has got one meanwhile
    }
  }

  async #renewKey(again) {
    this.#asking ??= this.#askKey(again).finally(() => (this.#asking = null));
    const key = await this.#asking;
    if (key === null) throw new ApiError(401, "This server wants an API key. Reload the page to enter it.");
    this.#key = key;
    sessionStorage.setItem(KEY, key);
  }
}

async function refusal(response) {
  try {
    const { error } = await response.json();
    return new ApiError(response.status, error.message, error.code);
  } catch {
    return new ApiError(response.status, `The server answered ${response.status} ${response.statusText}.`);
  }
}
