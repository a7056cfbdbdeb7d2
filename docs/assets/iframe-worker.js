// Lets the search work where the site is opened as files: browsers start no Worker from `file:`. A frame that nobody sees
// runs the worker's script instead, and the two exchange the same messages. With a server, this changes nothing.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #ready

    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      this.#ready = new Promise(resolve => {
        frame.onload = () => {
          const inside = frame.contentWindow
          // What a worker's global scope has, and a window's has not, or otherwise.
          inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
          inside.importScripts = (...urls) => urls.reduce((before, next) => before.then(() => load(inside, next)), Promise.resolve())
          resolve(load(inside, url).then(() => inside))
        }
      })
      document.documentElement.append(frame)
    }

    postMessage(data) {
      this.#ready.then(inside => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
    }
  }

  const load = (inside, url) => new Promise((resolve, reject) => {
    const script = inside.document.createElement("script")
    script.src = new URL(url, location.href).href
    script.onload = resolve
    script.onerror = reject
    inside.document.head.append(script)
  })
}
