-- POST questions that do not repeat, so that no cache of either side answers them; the summary as one line of JSON.
local words = {}
for word in string.gmatch(os.getenv("BENCH_WORDS"), "%S+") do words[#words + 1] = word end
local more = os.getenv("BENCH_MORE") or ""
bad = 0

function setup(thread)
  thread:set("seed", os.time())
  threads = threads or {}
  table.insert(threads, thread)
end

function init() math.randomseed(seed) end

function request()
  local question = {}
  for i = 1, 8 do question[i] = words[math.random(#words)] end
  return wrk.format("POST", nil, nil, '{"query": "' .. table.concat(question, " ") .. '?"' .. more .. '}')
end

function response(status)
  if status ~= 200 then bad = bad + 1 end
end

function done(summary, latency)
  local failed = 0
  for _, thread in ipairs(threads) do failed = failed + thread:get("bad") end
  local e = summary.errors
  io.write(string.format(
    'RESULT {"requests_per_second": %.1f, "p50_ms": %.2f, "p95_ms": %.2f, "p99_ms": %.2f, "failed": %d}\n',
    summary.requests / summary.duration * 1e6, latency:percentile(50) / 1e3, latency:percentile(95) / 1e3,
    latency:percentile(99) / 1e3, failed + e.connect + e.read + e.write + e.timeout))
end
