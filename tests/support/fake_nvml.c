/* A library with the NVML symbols that pynvml calls; environment variables script its devices.
 *
 * Time is CLOCK_MONOTONIC since FAKE_NVML_EPOCH_NS. All variables are read at every call, so one process can run several
 * scripts.
 *   FAKE_NVML_POWER      power steps of device 0: "0:100,0.8:250" is 100 W from 0 s, 250 W from 0.8 s; device k draws
 *                        (k + 1) times as much
 *   FAKE_NVML_PERIOD_MS  period at which counter and power refresh (20)
 *   FAKE_NVML_DEVICES    number of devices (1)
 *   FAKE_NVML_NO_COUNTER, FAKE_NVML_NO_POWER, FAKE_NVML_MIG   if set: no counter, no power reading, MIG enabled
 *   FAKE_NVML_INIT_ERROR code that nvmlInit returns
 *   FAKE_NVML_LOST_AT_S  time from which every reading returns "GPU is lost"
 *   FAKE_NVML_RESTART_AT_S time from which every reading returns "uninitialized", until the process reconnects
 *   FAKE_NVML_FAIL       errors at chosen calls: "nvmlDeviceGetPowerUsage@7:15" fails its seventh call with code 15
 *   FAKE_NVML_INSTANT    if set: instantaneous power is a field value, and the plain call averages over a second
 *   FAKE_NVML_THROTTLE   clock event reasons, a bit mask
 *   FAKE_NVML_THROTTLE_CALL  if set: they are reported in this one call only, counted from 1
 *   FAKE_NVML_PROCESSES  ids of processes that hold a context, "17,18"; SELF is this one
 *   FAKE_NVML_ACTIVE     share of the device (%) that processes use: "SELF:90,17:35"; nobody computes if it is not set
 *   FAKE_NVML_ACTIVE_UNTIL_S  time of the last such sample; now if it is not set
 *   FAKE_NVML_NO_PROCESS_UTILIZATION  if set: utilisation per process is not supported
 *   FAKE_NVML_UTILIZATION  utilisation of the device (%); not supported if it is not set
 *   FAKE_NVML_RESET_AT_S time from which the counter starts again at zero
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15, MAX_DEVICES = 8 };

static int ids[MAX_DEVICES] = {0, 1, 2, 3, 4, 5, 6, 7};

static double number(const char *name, double otherwise) {
    const char *text = getenv(name);
    return text && *text ? atof(text) : otherwise;
}

static int is_set(const char *name) {
    const char *text = getenv(name);
    return text && *text;
}

/* The scripted error of this call of `name`, or OK. */
static int scripted_error(const char *name) {
    static struct { char name[64]; int calls; } seen[32];
    static char script[128];
    const char *text = is_set("FAKE_NVML_FAIL") ? getenv("FAKE_NVML_FAIL") : "";
    int index = 0, call, code;
    if (strcmp(text, script) != 0) memset(seen, 0, sizeof seen); /* another script: restart counting */
    snprintf(script, sizeof script, "%s", text);
    while (index < 31 && seen[index].name[0] && strcmp(seen[index].name, name) != 0) index++;
    snprintf(seen[index].name, sizeof seen[index].name, "%s", name);
    seen[index].calls++;
    size_t length = strlen(name);
    if (strncmp(text, name, length) == 0 && sscanf(text + length, "@%d:%d", &call, &code) == 2)
        if (seen[index].calls == call) return code;
    return OK;
}

static int device_count(void) { return (int)number("FAKE_NVML_DEVICES", 1); }

static double now_s(void) {
    struct timespec stamp;
    clock_gettime(CLOCK_MONOTONIC, &stamp);
    const char *epoch = getenv("FAKE_NVML_EPOCH_NS");
    long long epoch_ns = epoch ? atoll(epoch) : 0;
    return (double)(stamp.tv_sec * 1000000000LL + stamp.tv_nsec - epoch_ns) * 1e-9;
}

/* Power at time_s, and the energy from 0 to time_s, of device 0. */
static void follow(double time_s, double *power_w, double *energy_j) {
    const char *text = getenv("FAKE_NVML_POWER");
    double begin_s = 0, watts = 0, next_s, next_w;
    int used;
    *energy_j = 0;
    *power_w = 0;
    while (text && sscanf(text, "%lf:%lf%n", &next_s, &next_w, &used) == 2 && next_s <= time_s) {
        *energy_j += watts * (next_s - begin_s);
        begin_s = next_s;
        watts = next_w;
        text += used;
        if (*text == ',') text++;
    }
    *energy_j += watts * (time_s - begin_s);
    *power_w = watts;
}

static double refreshed_s(void) {
    double period_s = number("FAKE_NVML_PERIOD_MS", 20) * 1e-3;
    return (double)(long long)(now_s() / period_s) * period_s;
}

static int is_lost(void) { return is_set("FAKE_NVML_LOST_AT_S") && now_s() >= number("FAKE_NVML_LOST_AT_S", 0); }

static double connected_s = 0;

static int is_restarted(void) {
    double restart_s = number("FAKE_NVML_RESTART_AT_S", 0);
    return is_set("FAKE_NVML_RESTART_AT_S") && now_s() >= restart_s && connected_s < restart_s;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    connected_s = now_s();
    return (int)number("FAKE_NVML_INIT_ERROR", OK);
}

int nvmlShutdown(void) { return OK; }

const char *nvmlErrorString(int code) {
    switch (code) {
        case NOT_SUPPORTED: return "Not Supported";
        case NOT_FOUND: return "Not Found";
        case GPU_IS_LOST: return "GPU is lost";
        default: return "scripted error";
    }
}

int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    snprintf(text, length, "555.42.fake");
    return OK;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = (unsigned)device_count();
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if ((int)index >= device_count()) return INVALID_ARGUMENT;
    *device = &ids[index];
    return OK;
}

int nvmlDeviceGetUUID(void *device, char *text, unsigned length) {
    snprintf(text, length, "GPU-%08x-fake", *(int *)device + 10);
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    char known[64];
    for (int index = 0; index < device_count(); index++) {
        nvmlDeviceGetUUID(&ids[index], known, sizeof known);
        if (strcmp(known, uuid) == 0) {
            *device = &ids[index];
            return OK;
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetName(void *device, char *text, unsigned length) {
    snprintf(text, length, "Fake GPU %d", *(int *)device);
    return OK;
}

int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    (void)device;
    if (!is_set("FAKE_NVML_MIG")) return NOT_SUPPORTED;
    *current = *pending = 1;
    return OK;
}

int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
    (void)sensor;
    *celsius = 40 + *(unsigned *)device;
    return OK;
}

int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *mhz) {
    (void)device;
    *mhz = kind == 1 ? 1410 : 1215; /* 1: streaming multiprocessors */
    return OK;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) {
    static int calls = 0;
    int only = (int)number("FAKE_NVML_THROTTLE_CALL", 0);
    (void)device;
    calls++;
    *reasons = !only || only == calls ? (unsigned long long)number("FAKE_NVML_THROTTLE", 0) : 0;
    return OK;
}

typedef struct {
    unsigned pid;
    unsigned long long used_bytes;
    unsigned gpu_instance, compute_instance;
} Process;

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, Process *processes) {
    (void)device;
    char text[128];
    unsigned found = 0, room = processes ? *count : 0;
    snprintf(text, sizeof text, "%s", is_set("FAKE_NVML_PROCESSES") ? getenv("FAKE_NVML_PROCESSES") : "");
    for (char *part = strtok(text, ","); part; part = strtok(NULL, ","), found++)
        if (found < room) {
            memset(&processes[found], 0, sizeof(Process));
            processes[found].pid = strcmp(part, "SELF") == 0 ? (unsigned)getpid() : (unsigned)atoi(part);
        }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}

typedef struct {
    unsigned pid;
    unsigned long long time_us;
    unsigned sm, memory, encoder, decoder;
} ProcessUtilization;

/* Samples since last_us, in microseconds of the wall clock. */
int nvmlDeviceGetProcessUtilization(void *device, ProcessUtilization *samples, unsigned *count, unsigned long long last_us) {
    (void)device;
    char text[128], owner[32];
    unsigned found = 0, room = samples ? *count : 0, percent;
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    double age_s = is_set("FAKE_NVML_ACTIVE_UNTIL_S") ? now_s() - number("FAKE_NVML_ACTIVE_UNTIL_S", 0) : 0;
    unsigned long long time_us = wall.tv_sec * 1000000ULL + wall.tv_nsec / 1000 - (age_s > 0 ? (unsigned long long)(age_s * 1e6) : 0);
    if (is_set("FAKE_NVML_NO_PROCESS_UTILIZATION")) return NOT_SUPPORTED;
    if (!is_set("FAKE_NVML_ACTIVE") || time_us < last_us) return NOT_FOUND;
    snprintf(text, sizeof text, "%s", getenv("FAKE_NVML_ACTIVE"));
    for (char *part = strtok(text, ","); part; part = strtok(NULL, ","), found++)
        if (found < room && sscanf(part, "%31[^:]:%u", owner, &percent) == 2) {
            memset(&samples[found], 0, sizeof(ProcessUtilization));
            samples[found].pid = strcmp(owner, "SELF") == 0 ? (unsigned)getpid() : (unsigned)atoi(owner);
            samples[found].time_us = time_us;
            samples[found].sm = percent;
        }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}

typedef struct {
    unsigned gpu, memory;
} Utilization;

int nvmlDeviceGetUtilizationRates(void *device, Utilization *rates) {
    (void)device;
    if (!is_set("FAKE_NVML_UTILIZATION")) return NOT_SUPPORTED;
    rates->gpu = (unsigned)number("FAKE_NVML_UTILIZATION", 0);
    rates->memory = 0;
    return OK;
}

int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy_mj) {
    int scripted = scripted_error("nvmlDeviceGetTotalEnergyConsumption");
    double power_w, energy_j, before_j = 0, time_s = refreshed_s();
    if (is_set("FAKE_NVML_NO_COUNTER")) return NOT_SUPPORTED;
    if (scripted) return scripted;
    if (is_restarted()) return UNINITIALIZED;
    if (is_lost()) return GPU_IS_LOST;
    follow(time_s, &power_w, &energy_j);
    if (is_set("FAKE_NVML_RESET_AT_S") && time_s >= number("FAKE_NVML_RESET_AT_S", 0))
        follow(number("FAKE_NVML_RESET_AT_S", 0), &power_w, &before_j);
    *energy_mj = (unsigned long long)((energy_j - before_j) * 1e3 * (*(int *)device + 1));
    return OK;
}

/* The plain call: current power, or its average over the last second on devices with a separate instantaneous value. */
int nvmlDeviceGetPowerUsage(void *device, unsigned *power_mw) {
    double power_w, energy_j, before_j = 0, time_s = refreshed_s();
    int scripted = scripted_error("nvmlDeviceGetPowerUsage");
    if (is_set("FAKE_NVML_NO_POWER")) return NOT_SUPPORTED;
    if (scripted) return scripted;
    if (is_restarted()) return UNINITIALIZED;
    if (is_lost()) return GPU_IS_LOST;
    follow(time_s, &power_w, &energy_j);
    if (is_set("FAKE_NVML_INSTANT")) {
        double unused_w;
        follow(time_s - 1, &unused_w, &before_j);
        power_w = energy_j - before_j;
    }
    *power_mw = (unsigned)(power_w * 1e3 * (*(int *)device + 1));
    return OK;
}

typedef struct {
    unsigned field, scope;
    long long timestamp_us, latency_us;
    unsigned kind;
    int code;
    union {
        unsigned number;
        unsigned long long longest;
    } value;
} FieldValue;

int nvmlDeviceGetFieldValues(void *device, int count, FieldValue *values) {
    double power_w, energy_j;
    for (int index = 0; index < count; index++) {
        values[index].code = values[index].field == 186 && is_set("FAKE_NVML_INSTANT") ? OK : NOT_SUPPORTED;
        if (values[index].code == OK && is_lost()) values[index].code = GPU_IS_LOST;
        follow(refreshed_s(), &power_w, &energy_j);
        values[index].value.number = (unsigned)(power_w * 1e3 * (*(int *)device + 1));
    }
    return OK;
}
