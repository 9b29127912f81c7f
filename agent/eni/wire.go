package eni

import (
	"errors"
	"fmt"
	"os"
)

// wire makes everything that the pod needs. It asks the kernel for nothing: what is
// there already, as after a repeated ADD, is made so once more.
func (p *Paths) wire(pod Pod) error {
	pol := p.network.policy()
	name, _, _ := vethOf(pod.Attachment)
	if p.isDying(name) { // the container was just removed, and is added again
		if err := p.reap(); err != nil {
			return err
		}
	}
	k, err := p.begin()
	if err != nil {
		return err
	}
	defer p.end(k)
	for _, o := range pol.podObjects(pod) {
		if err := o.put(k); err != nil {
			return fmt.Errorf("add %s: %w", text(o), err)
		}
	}
	return nil
}

// check returns what a pod's network lacks.
func (p *Paths) check(pod Pod) ([]step, error) {
	pol := p.network.policy()
	k, err := p.begin()
	if err != nil {
		return nil, err
	}
	defer p.end(k)
	have, err := k.observeAll(pol, pod)
	if err != nil {
		return nil, err
	}
	steps := diff(pol.podObjects(pod), have)
	for i, st := range steps {
		if st.drop {
			return steps[:i], nil
		}
	}
	return steps, nil
}

// observeAll returns what is there of one pod, inside and on the host. What is of
// others is in it, too.
func (k *kernel) observeAll(pol policy, pod Pod) ([]object, error) {
	links, err := k.links()
	if err != nil {
		return nil, err
	}
	host, err := k.observe(pol.hostObjects(pod), links, pod.Addr6.IsValid())
	if err != nil {
		return nil, err
	}
	inside, err := k.observeInside(pod)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("the pod's network namespace is gone: %w", err)
	}
	return append(host, inside...), err
}

// unwire removes what leads packets to and from the pod. Its veth is left to reap.
func (p *Paths) unwire(pod Pod) error {
	k, err := p.begin()
	if err != nil {
		return err
	}
	defer p.end(k)
	return p.unlead(k, pod)
}

// unlead is unwire with the lock.
func (p *Paths) unlead(k *kernel, pod Pod) (err error) {
	for _, o := range p.network.policy().hostObjects(pod) {
		switch o := o.(type) {
		case veth: // see reap
		case removable:
			err = errors.Join(err, o.drop(k))
		}
	}
	name, _, _ := vethOf(pod.Attachment)
	p.dying.Store(name, nil)
	return err
}

func (p *Paths) isDying(name string) bool {
	_, ok := p.dying.Load(name)
	return ok
}

// reap removes the veths of pods that were unwired. It takes the kernel some 20 ms
// for each, so nobody waits for it: neither a DEL nor, behind the lock, an ADD.
// What it leaves, the plan removes.
func (p *Paths) reap() error {
	p.reaping.Lock()
	defer p.reaping.Unlock()
	var all error
	p.dying.Range(func(name, _ any) bool {
		if err := p.open(&p.reaper); err != nil {
			all = err
			return false
		}
		all = errors.Join(all, p.reaper.deleteVeth(name.(string)))
		p.dying.Delete(name)
		return true
	})
	return all
}
