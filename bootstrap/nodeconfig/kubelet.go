package nodeconfig

import (
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// kubeletFields are the fields of KubeletConfiguration v1beta1, with what each
// holds: kubelet refuses to start with any other, which must be said before.
// Source: k8s.io/kubelet v0.36.3, config/v1beta1/types.go.
var kubeletFields = fieldsByKind(map[string]string{
	"text": `
		address cgroupDriver cgroupRoot clusterDomain configMapAndSecretChangeDetectionStrategy
		containerLogMaxSize containerRuntimeEndpoint contentType cpuManagerPolicy hairpinMode
		healthzBindAddress imagePullCredentialsVerificationPolicy imageServiceEndpoint kubeReservedCgroup
		kubeletCgroups memoryManagerPolicy memoryReservationPolicy podCIDR podLogsDir providerID
		reservedSystemCPUs resolvConf showHiddenMetricsForVersion staticPodPath staticPodURL
		systemCgroups systemReservedCgroup tlsCertFile tlsMinVersion tlsPrivateKeyFile
		topologyManagerPolicy topologyManagerScope volumePluginDir`,
	aDuration: `
		containerLogMonitorInterval cpuCFSQuotaPeriod cpuManagerReconcilePeriod
		evictionPressureTransitionPeriod fileCheckFrequency httpCheckFrequency imageMaximumGCAge
		imageMinimumGCAge nodeStatusReportFrequency nodeStatusUpdateFrequency runtimeRequestTimeout
		shutdownGracePeriod shutdownGracePeriodCriticalPods streamingConnectionIdleTimeout syncFrequency
		volumeStatsAggPeriod`,
	"a boolean": `
		cgroupsPerQOS cpuCFSQuota enableContentionProfiling enableControllerAttachDetach
		enableDebugFlagsHandler enableDebuggingHandlers enableProfilingHandler enableServer
		enableSystemLogHandler enableSystemLogQuery failCgroupV1 failSwapOn kernelMemcgNotification
		localStorageCapacityIsolation makeIPTablesUtilChains mergeDefaultEvictionSettings
		protectKernelDefaults registerNode rotateCertificates runOnce seccompDefault serializeImagePulls
		serverTLSBootstrap singleProcessOOMKill`,
	"a number": `memoryThrottlingFactor`,
	aWholeNumber: `
		containerLogMaxFiles containerLogMaxWorkers eventBurst eventRecordQPS evictionMaxPodGracePeriod
		healthzPort imageGCHighThresholdPercent imageGCLowThresholdPercent iptablesDropBit
		iptablesMasqueradeBit kubeAPIBurst kubeAPIQPS maxOpenFiles maxParallelImagePulls maxPods
		nodeLeaseDurationSeconds nodeStatusMaxImages oomScoreAdj podPidsLimit
		podsPerCore port readOnlyPort registryBurst registryPullQPS`,
	"a list": `
		allowedUnsafeSysctls clusterDNS enforceNodeAllocatable preloadedImagesVerificationAllowlist
		registerWithTaints reservedMemory shutdownGracePeriodByPodPriority tlsCipherSuites
		tlsCurvePreferences`,
	"a mapping": `
		authentication authorization crashLoopBackOff logging memorySwap staticPodURLHeader tracing
		userNamespaces`,
	aMappingOf("text"): `
		cpuManagerPolicyOptions evictionHard evictionMinimumReclaim evictionSoft evictionSoftGracePeriod
		kubeReserved qosReserved systemReserved topologyManagerPolicyOptions`,
	aMappingOf("a boolean"): `featureGates`,
})

const (
	aDuration    = "a duration, such as 30s"
	aWholeNumber = "a whole number"
)

func aMappingOf(kind string) string { return "a mapping whose every value is " + kind }

// misfit returns what is found instead of the kind, and where below the field; ""
// if the value is of it.
func misfit(value any, kind string) (found, below string) {
	is := kindOf(value)
	switch kind {
	case aDuration:
		text, ok := value.(string)
		if _, err := time.ParseDuration(text); ok && err != nil {
			return "the text " + quote(text), ""
		}
		kind = "text"
	case aWholeNumber:
		if n, ok := value.(float64); ok && n != math.Trunc(n) {
			return strconv.FormatFloat(n, 'g', -1, 64), ""
		}
		kind = "a number"
	case aMappingOf("text"), aMappingOf("a boolean"):
		values, _ := value.(map[string]any)
		of := strings.TrimPrefix(kind, aMappingOf(""))
		for _, name := range slices.Sorted(maps.Keys(values)) {
			if found := kindOf(values[name]); found != of {
				return found, name
			}
		}
		kind = "a mapping"
	}
	if is != kind {
		return is, ""
	}
	return "", ""
}

func fieldsByKind(namesByKind map[string]string) map[string]string {
	m := map[string]string{}
	for kind, names := range namesByKind {
		for name := range strings.FieldsSeq(names) {
			m[name] = kind
		}
	}
	return m
}

// kubeletOwned are the fields that tkenode sets itself, because the rest of the
// node depends on them, with what to write instead.
var kubeletOwned = map[string]string{
	"apiVersion":               "leave it out",
	"authentication":           "leave it out: the API server is authenticated by the cluster's CA and by webhook",
	"authorization":            "leave it out: kubelet asks the API server",
	"cgroupDriver":             "leave it out: containerd and kubelet both use systemd",
	"clusterDNS":               "write it in cluster.dns",
	"clusterDomain":            "write it in cluster.domain",
	"containerRuntimeEndpoint": "leave it out: it is the containerd that tkenode runs",
	"enableServer":             "leave it out: logs, exec and probes need the server",
	"healthzBindAddress":       "leave it out: tkenode probes it",
	"healthzPort":              "leave it out: tkenode probes it",
	"imageServiceEndpoint":     "leave it out: it is the containerd that tkenode runs",
	"kind":                     "leave it out",
	"maxPods":                  "write it in kubelet.maxPods",
	"podCIDR":                  "leave it out: pods have VPC addresses, see network",
	"port":                     "leave it out: the API server reaches kubelet on 10250",
	"providerID":               "leave it out: it is made of the instance's own zone and id",
	"readOnlyPort":             "leave it out: the port without authentication stays closed",
	"registerNode":             "leave it out: the Node registers itself",
	"registerWithTaints":       "write them in node.taints",
	"rotateCertificates":       "leave it out: the client certificate is always rotated",
	"runOnce":                  "leave it out",
	"serverTLSBootstrap":       "leave it out",
	"tlsCertFile":              "leave it out",
	"tlsPrivateKeyFile":        "leave it out",
}
