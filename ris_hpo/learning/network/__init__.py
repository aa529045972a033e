"""The network: from features of a scene to sources, their number and their covariance.

    spec.py      NetworkSpec: form and size
    bodies.py    the two bodies, from features to hidden states: SpectralBody and TokenBody
    heads.py     from hidden states to proposals, counts and covariance factors
    model.py     Network, which joins a body and its heads, and Outputs

The body ``spectra`` reads log spectra on the grid and gives a logit, an offset and a power for every cell; slots are
the best local maxima. The body ``tokens`` reads back-projected snapshots and gives one slot per learned query. The
covariance head ``structured`` builds sum_c p_c a(v_c, w_c, rho_c) a^H + sigma^2 I from predicted geometry; the head
``factor`` predicts F with R = F F^H + sigma^2 I, spanned by steering vectors (``atoms``) or not (``free``).
"""

from ris_hpo.learning.network.heads import CountMixing, count_weights
from ris_hpo.learning.network.model import Network, Outputs, slot_geometry
from ris_hpo.learning.network.spec import NetworkSpec, large

__all__ = ["CountMixing", "Network", "NetworkSpec", "Outputs", "count_weights", "large", "slot_geometry"]
