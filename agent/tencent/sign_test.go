package tencent

import (
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// TestAuthorization reproduces the worked example of
// https://cloud.tencent.com/document/api/213/30654, masked key and all.
func TestAuthorization(t *testing.T) {
	c := Credentials{
		SecretID:  "AKIDz8krbsJ5yKBZQpn74WFkmLPx3*******",
		SecretKey: node.NewSecret("Gu5t9xGARNpq86cd98joQYCN3*******"),
	}
	payload := `{"Limit": 1, "Filters": [{"Values": ["\u672a\u547d\u540d"], "Name": "instance-name"}]}`
	got := authorization(c, "cvm", "cvm.tencentcloudapi.com", "DescribeInstances", []byte(payload), time.Unix(1551113065, 0))
	const want = "TC3-HMAC-SHA256 Credential=AKIDz8krbsJ5yKBZQpn74WFkmLPx3*******/2019-02-25/cvm/tc3_request, " +
		"SignedHeaders=content-type;host;x-tc-action, " +
		"Signature=be4f67d323c78ab9acb7395e43c0dbcf822a9cfac32fea2449a7bc7726b770a3"
	if got != want {
		t.Errorf("authorization:\n got %s\nwant %s", got, want)
	}
}
