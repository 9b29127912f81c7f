package vpc

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

const dnsTTL = 60 // seconds

// SetHosts replaces what DNS answers. A name that begins with "*." stands for every name below it that has no entry
// of its own. The names of Tencent's NTP servers are there without being named; every other name does not exist.
func (n *Network) SetHosts(hosts map[string]netip.Addr) {
	lower := map[string]netip.Addr{}
	for i := range 5 {
		lower[fmt.Sprintf("time%d.tencentyun.com", i+1)] = NTPServer.Addr()
	}
	for name, addr := range hosts {
		lower[strings.ToLower(strings.TrimSuffix(name, "."))] = addr.Unmap()
	}
	n.hosts.Store(&lower)
}

func (n *Network) lookup(name string) (netip.Addr, bool) {
	hosts := *n.hosts.Load()
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if a, ok := hosts[name]; ok {
		return a, true
	}
	for {
		_, below, ok := strings.Cut(name, ".")
		if !ok {
			return netip.Addr{}, false
		}
		if a, ok := hosts["*."+below]; ok {
			return a, true
		}
		name = below
	}
}

func (n *Network) startDNS(ctx context.Context) error {
	for _, a := range dnsServers {
		at := netip.AddrPortFrom(a, 53)
		packets, err := n.ListenPacket(at)
		if err != nil {
			return err
		}
		n.serveDNS(ctx, &dns.Server{PacketConn: packets})
		conns, err := n.Listen(at)
		if err != nil {
			return err
		}
		n.serveDNS(ctx, &dns.Server{Listener: conns})
	}
	return nil
}

func (n *Network) serveDNS(ctx context.Context, s *dns.Server) {
	started := make(chan struct{})
	s.NotifyStartedFunc = func() { close(started) }
	s.Handler = dns.HandlerFunc(n.answerDNS)
	n.services.Go(func() {
		if err := s.ActivateAndServe(); err != nil && ctx.Err() == nil {
			n.log.Error("DNS stopped", "err", err)
		}
	})
	n.services.Go(func() {
		<-started // Shutdown before it has no effect
		<-ctx.Done()
		s.Shutdown()
	})
}

func (n *Network) answerDNS(w dns.ResponseWriter, request *dns.Msg) {
	reply := new(dns.Msg).SetReply(request)
	reply.Authoritative, reply.RecursionAvailable = true, true
	if len(request.Question) != 1 || request.Opcode != dns.OpcodeQuery {
		reply.SetRcode(request, dns.RcodeRefused)
		w.WriteMsg(reply)
		return
	}
	question := request.Question[0]
	addr, ok := n.lookup(question.Name)
	switch {
	case !ok:
		reply.SetRcode(request, dns.RcodeNameError)
	case addr.Is4() && question.Qclass == dns.ClassINET && (question.Qtype == dns.TypeA || question.Qtype == dns.TypeANY):
		reply.Answer = []dns.RR{&dns.A{
			Hdr: dns.RR_Header{Name: question.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: dnsTTL},
			A:   net.IP(addr.AsSlice()),
		}}
	case addr.Is6() && question.Qclass == dns.ClassINET && (question.Qtype == dns.TypeAAAA || question.Qtype == dns.TypeANY):
		reply.Answer = []dns.RR{&dns.AAAA{
			Hdr:  dns.RR_Header{Name: question.Name, Rrtype: dns.TypeAAAA, Class: dns.ClassINET, Ttl: dnsTTL},
			AAAA: net.IP(addr.AsSlice()),
		}}
	}
	w.WriteMsg(reply)
}
