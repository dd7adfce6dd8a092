-- Posts the bodies of a folder in turn, notes when each answer came and of what status.
-- Arguments: folder, number of bodies, content type, file for the result.
local ffi = require("ffi")
ffi.cdef [[
  typedef struct { long seconds; long nanoseconds; } bench_time;
  int clock_gettime(int clock, bench_time *time);
]]
local CLOCK_MONOTONIC = 1
local found = ffi.new("bench_time")
local threads = {}

local function now()
  ffi.C.clock_gettime(CLOCK_MONOTONIC, found)
  return tonumber(found.seconds) + tonumber(found.nanoseconds) * 1e-9
end

function setup(thread)
  table.insert(threads, thread)
end

function init(arguments)
  local folder, count, content_type = arguments[1], tonumber(arguments[2]), arguments[3]
  output = arguments[4]
  requests, place, times, statuses = {}, 0, {}, {}
  for number = 0, count - 1 do
    local file = assert(io.open(folder .. "/" .. number, "rb"))
    local headers = { ["Content-Type"] = content_type }
    requests[number] = wrk.format("POST", nil, headers, file:read("*a"))
    file:close()
  end
  total = count
end

function request()
  place = (place + 1) % total
  return requests[place]
end

function response(status)
  times[#times + 1] = now()
  statuses[#statuses + 1] = status
end

function done(summary, latency)
  local thread = threads[1]
  local file = assert(io.open(thread:get("output"), "w"))
  file:write(string.format("%f %f\n", latency:percentile(50) / 1000, latency:percentile(99) / 1000))
  local errors = summary.errors
  file:write(string.format("%d\n", errors.connect + errors.read + errors.write + errors.timeout))
  local times, statuses = thread:get("times"), thread:get("statuses")
  for number = 1, #times do
    file:write(string.format("%.6f %d\n", times[number], statuses[number]))
  end
  file:close()
end
