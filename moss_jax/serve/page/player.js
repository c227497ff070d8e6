// Plays an answer while it is being generated. It starts when an element with data-speech="ADDRESS" appears in the page;
// the address returns raw 16-bit mono samples, and each chunk is scheduled directly after the previous one.
(() => {
  // Gradio's requests go to addresses below that of the page, also if a proxy changes scheme, host, port or path.
  if (window.gradio_config) window.gradio_config.root = new URL(".", location.href).href.replace(/\/$/, "");

  const LEAD = 0.06; // s between the arrival of a chunk and its playback, if nothing is playing
  const player = {
    stats: [], // per answer: pressed, opened, first (s of the page's clock), samples, gaps, gapSeconds, done
    context: null,
    output: null, // all audio passes through this node
    current: null,
  };
  window.mossPlayer = player;
  const now = () => performance.now() / 1000;
  let pressed = 0;

  function speaks(answer) {
    player.current = answer;
    document.body.classList.toggle("moss-speaking", answer !== null); // style.css highlights the Stop button
  }

  function ended(answer) {
    if (!answer.complete || answer.sources.size) return;
    answer.stats.done = true;
    if (player.current === answer) speaks(null);
  }

  function wake(rate) {
    if (!player.context || (rate && player.context.sampleRate !== rate)) {
      if (player.context) player.context.close();
      player.context = new AudioContext(rate ? { sampleRate: rate } : {});
      player.output = player.context.createGain();
      player.output.connect(player.context.destination);
      document.dispatchEvent(new CustomEvent("moss-player", { detail: player }));
    }
    if (player.context.state === "suspended") player.context.resume();
    return player.context;
  }

  player.stop = () => {
    const answer = player.current;
    if (!answer) return;
    speaks(null);
    answer.abort.abort();
    for (const source of answer.sources) source.stop();
    answer.stats.done = true;
  };

  function put(answer, data, rate) {
    const context = wake(rate);
    const buffer = context.createBuffer(1, data.length, rate);
    const channel = buffer.getChannelData(0);
    for (let i = 0; i < data.length; i++) channel[i] = data[i] / 32768;
    const source = context.createBufferSource();
    source.buffer = buffer;
    source.connect(player.output);
    const earliest = context.currentTime + LEAD;
    if (answer.next < earliest) {
      if (answer.stats.samples) {
        answer.stats.gaps += 1;
        answer.stats.gapSeconds += earliest - answer.next;
      }
      answer.next = earliest;
    }
    if (!answer.stats.samples) answer.stats.first = now() + LEAD;
    source.start(answer.next);
    answer.next += buffer.duration;
    answer.stats.samples += data.length;
    answer.sources.add(source);
    source.onended = () => {
      answer.sources.delete(source);
      ended(answer);
    };
  }

  player.play = async (address) => {
    player.stop();
    for (const other of document.querySelectorAll("audio")) other.pause();
    const stats = { pressed, opened: now(), first: null, samples: 0, gaps: 0, gapSeconds: 0, done: false };
    const answer = { abort: new AbortController(), sources: new Set(), next: 0, complete: false, stats };
    speaks(answer);
    player.stats.push(stats);
    try {
      const response = await fetch(address, { signal: answer.abort.signal });
      const rate = Number(response.headers.get("X-Sample-Rate"));
      if (!response.ok || !rate) throw new Error(`no sound: ${response.status}`);
      const reader = response.body.getReader();
      let rest = new Uint8Array(0);
      for (;;) {
        const { done, value } = await reader.read();
        if (done || player.current !== answer) break;
        const bytes = new Uint8Array(rest.length + value.length);
        bytes.set(rest);
        bytes.set(value, rest.length);
        const even = bytes.length - (bytes.length % 2);
        rest = bytes.slice(even);
        if (even) put(answer, new Int16Array(bytes.buffer.slice(0, even)), rate);
      }
    } catch (error) {
      if (error.name !== "AbortError") console.warn("moss player:", error);
    }
    answer.complete = true;
    ended(answer);
  };

  let last = "";
  let height = 0;
  new MutationObserver(() => {
    const talk = document.getElementById("moss-talk");
    if (talk && talk.scrollHeight !== height) {
      height = talk.scrollHeight;
      talk.scrollTo({ top: height, behavior: "smooth" });
    }
    const element = document.querySelector("[data-speech]");
    if (element && element.dataset.speech !== last) {
      last = element.dataset.speech;
      player.play(last);
    }
  }).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ["data-speech"] });

  // Browsers allow audio only after a user gesture.
  document.addEventListener("pointerdown", () => { pressed = now(); wake(player.context && player.context.sampleRate); }, true);
  document.addEventListener("keydown", () => { pressed = now(); }, true);
  document.addEventListener("click", (event) => {
    if (event.target.closest("#moss-stop, #moss-clear, #moss-mic .record-button")) player.stop();
  }, true);
  document.addEventListener("play", (event) => {
    if (event.target instanceof HTMLMediaElement) player.stop();
  }, true);
})();
