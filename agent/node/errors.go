package node

import (
	"errors"
	"fmt"
)

// Class says what to do about an error.
type Class int

// The classes of errors. An error that says nothing is transient.
const (
	ClassTransient Class = iota // try again, with back-off
	ClassWaiting                // not an error of ours: something else is not there yet
	ClassTerminal               // a human must act; never retried hot
)

func (c Class) String() string {
	return [...]string{"transient", "waiting", "terminal"}[c]
}

// ErrOutdated is wrapped by what a change returns when what it was planned on is
// no longer so. It says nothing about whether the next plan can be carried out, so
// it is no reason to back off.
var ErrOutdated = errors.New("the plan is outdated")

// Error is an error with a class, a stable reason for machines, and advice.
type Error struct {
	Class  Class
	Reason string // CamelCase, becomes the condition's reason
	Fix    string // what the reader can do, a sentence; may be empty
	Err    error
}

func (e *Error) Error() string {
	if e.Fix == "" {
		return e.Err.Error()
	}
	return e.Err.Error() + "; " + e.Fix
}

func (e *Error) Unwrap() error { return e.Err }

// Waiting returns an error that says what is waited for.
func Waiting(reason, format string, args ...any) error {
	return &Error{Class: ClassWaiting, Reason: reason, Err: fmt.Errorf(format, args...)}
}

// Terminal returns an error that only a human can end, with what to do about it.
func Terminal(reason, fix string, err error) error {
	return &Error{Class: ClassTerminal, Reason: reason, Fix: fix, Err: err}
}

// ClassOf returns the class of err; an error without one is transient.
func ClassOf(err error) Class {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Class
	}
	return ClassTransient
}

// ReasonOf returns the reason that err carries, or fallback.
func ReasonOf(err error, fallback string) string {
	if e, ok := errors.AsType[*Error](err); ok && e.Reason != "" {
		return e.Reason
	}
	return fallback
}
