# SPDX-License-Identifier: Apache-2.0
"""Any cell as one fused loop: its step traced, sorted, lowered to a program, and run with its gradients."""
